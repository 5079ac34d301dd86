// Weights on a uniform grid of which two of every four in a row are kept: products with few tokens, the dense weight.
//
// `sparse` is narrow.cu on sparse tensor cores. Here a chunk has 256 columns, of which 128 are kept: their codes lie as those
// of any chunk of 128 columns (codes.cuh), and behind them 512 bytes say where they belong (sparsity.cuh). Of these each
// lane has four words. Word i serves steps 2 i and 2 i + 1: lanes 0 and 1 of every four have what the first of these two
// steps looks at, lanes 2 and 3 what the second does. Statistics are those of weights.cuh with the kept columns counted.
//
// Macros: BITS, SCALE, GROUPS (of a chunk), OFFSET: see weights.cuh; T: Half or BFloat; WARPS. Of `sparse` besides:
// NT, RT, DEPTH, FEW: see narrow.cu. Without NT the file is `dequantize_sparse`.
#define KIND 0  // GRID
#include "weights.cuh"
#include "sparsity.cuh"

constexpr int WIDTH = 2 * CHUNK;  // columns of a chunk
constexpr int CODE_BYTES = Words<BITS>::BYTES, CHUNK_BYTES = CODE_BYTES + 512;

// What a lane has of a chunk.
struct Held {
    Weights<T> kept;
    u32 positions[STEPS / 2];

    // `mine`: the chunk's first byte plus what Words::place says
    __device__ __forceinline__ void stream(const u8* mine, int lane) {
        kept.words.stream(mine, lane);
        const uint4 v = stream16<CODE_BYTES>(mine);
        positions[0] = v.x, positions[1] = v.y, positions[2] = v.z, positions[3] = v.w;
    }
};

#ifdef NT
constexpr int TOKENS = 8 * NT, ROWS = RT * TILE;
constexpr int PITCH_X = WIDTH * 2 + 16;  // bytes of a token's inputs in shared memory: rows fall on different banks
constexpr int PITCH_SUM = TOKENS + 1;    // floats
constexpr int COPIES = FEW ? 2 : TOKENS;
constexpr bool AFTER = NT == 1;  // scales are applied to sums over a group; with more tokens it is cheaper to weights

// d += the step's columns of a tile times b
DEVICE void multiply(float* d, const u32* a, const u32* b, const Held& held, int step) {
    if (step % 2 == 0) {
        mma_sparse<0>(T(), d, a, b, held.positions[step / 2]);
    } else {
        mma_sparse<1>(T(), d, a, b, held.positions[step / 2]);
    }
}

// sums += scale part + offset total for one tile; part and total are cleared.
DEVICE void finish_group(float* sums, float* part, float* total, const Weights<T>& kept, int group) {
    float scale[2], offset[2] = {};
    kept.group(group, 0, scale[0], offset[0]);
    kept.group(group, 1, scale[1], offset[1]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        sums[e] = fmaf(scale[e / 2], part[e], sums[e]);
        if (Weights<T>::HAS_OFFSET) sums[e] = fmaf(offset[e / 2], total[e], sums[e]);
        part[e] = total[e] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    sparse(const u8* codes, const u8* scales, const u8* offsets, const u16* x, u16* out, int tokens, int rows, int columns,
           int chunks, int shift) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    const int tiles = (rows + TILE - 1) / TILE, first_tile = blockIdx.x * RT, first_token = blockIdx.y * TOKENS;
    const int count = min(TOKENS, tokens - first_token);
    const Layer layer = {codes, scales, offsets, nullptr, chunks, shift};
    x += (u64)first_token * columns;

    // Of the inputs of a chunk a lane copies 8 columns of every token.
    const int slot = min(TOKENS, tokens) * PITCH_X;
    const u32 own = shared_address(shared + warp * DEPTH * slot), to = own + lane * 16;
    int next = warp;
    const u8* next_codes[RT];
#pragma unroll
    for (int r = 0; r < RT; r++)
        next_codes[r] = layer.row(min(first_tile + r, tiles - 1), CHUNK_BYTES) + warp * (BAND * CHUNK_BYTES) +
                        Words<BITS>::place(lane);
    const u16* next_x = x + warp * WIDTH + lane * 8;

    Held held[DEPTH][RT];
    auto request = [&](int d) {
        if (next < chunks) {
#pragma unroll
            for (int r = 0; r < RT; r++) {
                held[d][r].stream(next_codes[r], lane);
                next_codes[r] += WARPS * BAND * CHUNK_BYTES;
            }
#pragma unroll
            for (int r = 0; r < RT; r++)
                held[d][r].kept.statistics(Weights<T>::Place(layer, min(first_tile + r, tiles - 1), lane), layer.index(next));
            const bool inside = next * WIDTH + lane * 8 < columns;
#pragma unroll
            for (int m = 0; m < COPIES; m++)
                if (m < count) copy16(to + d * slot + m * PITCH_X, next_x + (u64)m * columns, inside);
        }
        next += WARPS;
        next_x += WARPS * WIDTH;
        copies_commit();
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) request(d);

    float sums[RT][NT][4] = {};
    u32 at[NT];  // where a lane finds its row of a matrix of inputs; tokens past the last read it again, for nothing
#pragma unroll
    for (int n = 0; n < NT; n++) at[n] = own + min(n * 8 + lane % 8, count - 1) * PITCH_X + lane / 8 * 16;
    for (int chunk = warp; chunk < chunks;) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++, chunk += WARPS) {
            if (chunk >= chunks) break;
            copies_wait<DEPTH - 1>();
            __syncwarp();
            float part[RT][4] = {}, total[RT][4] = {};  // of a group, with AFTER: x (code - middle), and x, where kept
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                u32 b[NT][4];
#pragma unroll
                for (int n = 0; n < NT; n++) load_matrices(b[n], at[n] + d * slot + s * 64);
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const Weights<T>& kept = held[d][r].kept;
                    u32 a[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) a[e] = AFTER ? kept.pair(shared, 4 * s + e) : kept.weight(shared, 4 * s + e);
#pragma unroll
                    for (int n = 0; n < NT; n++) multiply(AFTER ? part[r] : sums[r][n], a, b[n], held[d][r], s);
                    if (AFTER && Weights<T>::HAS_OFFSET) {
                        constexpr u32 one = (T::BIAS << T::MANTISSA) * 0x10001u;
                        const u32 ones[4] = {one, one, one, one};
                        multiply(total[r], ones, b[0], held[d][r], s);
                    }
                    if (AFTER && (s + 1) % Weights<T>::GROUP_STEPS == 0)
                        finish_group(sums[r][0], part[r], total[r], kept, s / Weights<T>::GROUP_STEPS);
                }
            }
            __syncwarp();
            request(d);
        }
    }

    copies_wait<0>();
    __syncthreads();  // the inputs' place is free
    float* all = (float*)shared;
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                all[(warp * ROWS + r * TILE + lane / 4 + e / 2 * 8) * PITCH_SUM + n * 8 + lane % 4 * 2 + e % 2] =
                    sums[r][n][e];
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * count; i += WARPS * 32) {
        const int r = i % ROWS, m = i / ROWS, row = first_tile * TILE + r;
        if (row < rows) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += all[(w * ROWS + r) * PITCH_SUM + m];
            out[(u64)(first_token + m) * rows + row] = (u16)T::pack(sum, 0.0f);
        }
    }
}

#else
constexpr int PITCH = WIDTH * 2 + 32;  // bytes of a row in shared memory: four rows of what a lane writes fill the banks

// Columns are a multiple of 4. A warp makes one chunk, puts it in order in shared memory and writes whole lines.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    dequantize_sparse(const u8* codes, const u8* scales, const u8* offsets, u16* out, int rows, int columns, int chunks,
                      int shift) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.y;
    const int chunk = blockIdx.x * WARPS + warp, g = lane / 4, c = lane % 4;
    const Layer layer = {codes, scales, offsets, nullptr, chunks, shift};
    u8* own = shared + warp * TILE * PITCH;
    if (chunk >= chunks) return;

    Held held;
    held.stream(layer.row(tile, CHUNK_BYTES) + (u64)chunk * (BAND * CHUNK_BYTES) + Words<BITS>::place(lane), lane);
    held.kept.statistics(Weights<T>::Place(layer, tile, lane), layer.index(chunk));
#pragma unroll
    for (int p = 0; p < 4 * STEPS; p += 2) {  // pairs p and p + 1: rows g and g + 8
        const int step = p / 4, half = p / 2 % 2;
        const u32 word = __shfl_sync(~0u, held.positions[step / 2], 4 * g + step % 2 * 2 + half);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 both = held.kept.weight(shared, p + r), places = word >> (16 * r + 4 * c) & 15;
            const u64 four = (u64)(both & 0xffff) << (places & 3) * 16 | (u64)(both >> 16) << (places >> 2) * 16;
            *(uint2*)(own + (g + 8 * r) * PITCH + (step * 32 + half * 16 + c * 4) * 2) =
                make_uint2((u32)four, (u32)(four >> 32));
        }
    }
    __syncwarp();
    const int first_row = tile * TILE, first_column = chunk * WIDTH;
#pragma unroll
    for (int i = 0; i < 2 * TILE; i++) {
        const int row = i / 2, column = i % 2 * CHUNK + lane * 4;
        if (first_row + row < rows && first_column + column < columns)
            *(uint2*)(out + (u64)(first_row + row) * columns + first_column + column) =
                *(const uint2*)(own + row * PITCH + column * 2);
    }
}
#endif

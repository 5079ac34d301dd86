// out[tokens, rows] = x[tokens, columns] W^T for few tokens: as fast as the packed weights can be read.
//
// A block owns RT tiles of 16 rows and TOKENS = 8 NT tokens; its warps share out the columns by chunks of 128 and add
// their sums up at the end, always in the same order. Every warp keeps DEPTH chunks on their way: the codes in
// registers, the inputs in shared memory of its own, so that no warp ever waits for another before the end. Weights are
// the 16-row operand of the tensor cores, tokens the 8-column one.
//
// Single weights that are corrected from a list, in compressed sparse rows, are the work of four more warps meanwhile.
//
// Macros: KIND and what it asks for (weights.cuh); T: Half or BFloat, the type of x and out; NT, RT, WARPS, DEPTH;
// FEW: 1 if there are at most 2 tokens; OUTLIERS: 1 where there is such a list.
#include "weights.cuh"

#ifndef OUTLIERS
#define OUTLIERS 0
#endif

constexpr int TOKENS = 8 * NT, ROWS = RT * TILE;
constexpr int PITCH_X = CHUNK * 2 + 16;   // bytes of a token's inputs in shared memory: rows fall on different banks
constexpr int PITCH_SUM = TOKENS + 1;     // floats
constexpr int CODE_BYTES = Words<BITS>::BYTES;
constexpr int COPIES = FEW ? 1 : TOKENS / 2;  // of 8 columns of every other token, by a lane
constexpr int HELPERS = OUTLIERS ? 4 : 0, THREADS = (WARPS + HELPERS) * 32;
constexpr bool AFTER = NT == 1;  // scales are applied to sums over a group; with more tokens it is cheaper to weights

// The corrections of one row for every token, into sums[TOKENS], by 16 lanes.
DEVICE void correct(u32 begin, u32 end, const u16* columns, const u16* values, const u16* x, u64 stride, int count,
                    float* to, int lane) {
    float sums[TOKENS] = {};
#pragma unroll 4
    for (u32 i = begin + lane; i < end; i += 16) {
        const float value = T::low(values[i]);
        const u16* inputs = x + columns[i];
#pragma unroll
        for (int m = 0; m < TOKENS; m++)
            if (m < count) sums[m] = fmaf(value, T::low(inputs[m * stride]), sums[m]);
    }
#pragma unroll
    for (int m = 0; m < TOKENS; m++)
        if (m < count) {
#pragma unroll
            for (int step = 8; step; step >>= 1) sums[m] += __shfl_xor_sync(~0u, sums[m], step);
            if (lane == 0) to[m] = sums[m];
        }
}

// sums += scale part + offset total for one tile; part is cleared.
DEVICE void finish_group(float* sums, float* part, const float* total, const Weights<T>& held, int group) {
    float scale[2], offset[2] = {};
    held.group(group, 0, scale[0], offset[0]);
    held.group(group, 1, scale[1], offset[1]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        sums[e] = fmaf(scale[e / 2], part[e], sums[e]);
        if (Weights<T>::HAS_OFFSET) sums[e] = fmaf(offset[e / 2], total[e % 2], sums[e]);
        part[e] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    narrow(const u8* codes, const u8* scales, const u8* offsets, const u8* table, const u32* outlier_rows,
           const u16* outlier_columns, const u16* outlier_values, const u16* x, u16* out, int tokens, int rows,
           int columns, int chunks, int shift) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    const int tiles = (rows + TILE - 1) / TILE, first_tile = blockIdx.x * RT, first_token = blockIdx.y * TOKENS;
    const int count = min(TOKENS, tokens - first_token);
    const Layer layer = {codes, scales, offsets, table, chunks, shift};
    x += (u64)first_token * columns;

    // shared memory: tables, corrections, then inputs and (after them) sums in the same place
    constexpr int table_bytes = AFTER ? Weights<T>::SHARED_PAIRS : Weights<T>::SHARED_WEIGHTS;
    constexpr int tables = KIND == BOOK ? table_bytes * RT : table_bytes;
    float* corrections = (float*)(shared + tables);
    u8* inputs = shared + tables + (OUTLIERS ? ROWS * TOKENS * 4 : 0);
    const int slot = min(TOKENS, tokens) * PITCH_X;
    u8* own = inputs + warp * DEPTH * slot;

    // The warp takes chunks warp, warp + WARPS, ...; these point at the next one to be asked for. Of the inputs a lane
    // copies 8 columns of every other token.
    int next = warp;
    const u8* next_codes[RT];
#pragma unroll
    for (int r = 0; r < RT; r++)
        next_codes[r] = layer.row(min(first_tile + r, tiles - 1), CODE_BYTES) + warp * (BAND * CODE_BYTES) +
                        Words<BITS>::place(lane);
    const u16* next_x = x + (u64)(lane / 16) * columns + warp * CHUNK + lane % 16 * 8;
    const u32 own_address = shared_address(own), to = own_address + lane / 16 * PITCH_X + lane % 16 * 16;
    const u64 two_tokens = 2 * (u64)columns;

    Weights<T> held[DEPTH][RT];
    const int last = warp < WARPS ? chunks : 0;  // helpers have no chunks
    auto request = [&](int d) {
        if (next < last) {
#pragma unroll
            for (int r = 0; r < RT; r++) {
                held[d][r].words.stream(next_codes[r], lane);
                next_codes[r] += WARPS * BAND * CODE_BYTES;
            }
#pragma unroll
            for (int r = 0; r < RT; r++)
                held[d][r].statistics(typename Weights<T>::Place(layer, min(first_tile + r, tiles - 1), lane), layer.index(next));
            const bool inside = next * CHUNK + lane % 16 * 8 < columns;
#pragma unroll
            for (int j = 0; j < COPIES; j++)
                if (2 * j + lane / 16 < count)
                    copy16(to + d * slot + j * 2 * PITCH_X, next_x + j * two_tokens, inside);
        }
        next += WARPS;
        next_x += WARPS * CHUNK;
        copies_commit();
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) request(d);

    auto prepare = [&](u8* place, int tile) {
        if (AFTER) {
            Weights<T>::prepare_pairs(place, layer, tile, THREADS);
        } else {
            Weights<T>::prepare_weights(place, layer, tile, THREADS);
        }
    };
    for (int r = 0; r < (KIND == BOOK ? RT : 1); r++) prepare(shared + r * table_bytes, min(first_tile + r, tiles - 1));
    if (tables) __syncthreads();
    if (OUTLIERS && warp >= WARPS) {
        for (int r = 2 * (warp - WARPS); r < ROWS; r += 2 * HELPERS) {  // two rows a warp
            const int own_row = r + lane / 16, row = min(first_tile * TILE + own_row, rows - 1);
            correct(outlier_rows[row], outlier_rows[row + 1], outlier_columns, outlier_values, x, columns, count,
                    corrections + own_row * TOKENS, lane % 16);
        }
    }

    float sums[RT][NT][4] = {};
    u32 at[NT];  // where a lane finds its row of a matrix of inputs; tokens past the last read it again, for nothing
#pragma unroll
    for (int n = 0; n < NT; n++) at[n] = own_address + min(n * 8 + lane % 8, count - 1) * PITCH_X + lane / 8 * 16;
    for (int chunk = warp; chunk < last;) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++, chunk += WARPS) {
            if (chunk >= last) break;
            copies_wait<DEPTH - 1>();
            __syncwarp();
            float part[RT][4] = {}, total[4] = {};  // of a group, with AFTER: x (code - middle), and x
            u32 b[NT][4];                           // inputs of two steps
#pragma unroll
            for (int r = 0; r < RT; r++) held[d][r].settle();
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                if (s % 2 == 0) {
#pragma unroll
                    for (int n = 0; n < NT; n++) load_matrices(b[n], at[n] + d * slot + s * 32);
                }
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const u8* own_table = KIND == BOOK ? shared + r * table_bytes : shared;
                    u32 a[4];
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        a[e] = AFTER ? held[d][r].pair(own_table, 4 * s + e) : held[d][r].weight(own_table, 4 * s + e);
#pragma unroll
                    for (int n = 0; n < NT; n++) T::mma(AFTER ? part[r] : sums[r][n], a, b[n][s % 2 * 2], b[n][s % 2 * 2 + 1]);
                }
                if (AFTER && Weights<T>::HAS_OFFSET) {
                    constexpr u32 one = (T::BIAS << T::MANTISSA) * 0x10001u;
                    const u32 ones[4] = {one, one, one, one};
                    T::mma(total, ones, b[0][s % 2 * 2], b[0][s % 2 * 2 + 1]);
                }
                if (AFTER && (s + 1) % Weights<T>::GROUP_STEPS == 0) {
#pragma unroll
                    for (int r = 0; r < RT; r++)
                        finish_group(sums[r][0], part[r], total, held[d][r], s / Weights<T>::GROUP_STEPS);
#pragma unroll
                    for (int e = 0; e < 4; e++) total[e] = 0;
                }
            }
            __syncwarp();
            request(d);
        }
    }

    copies_wait<0>();
    __syncthreads();  // the inputs' place is free
    float* all = (float*)inputs;
#pragma unroll
    for (int r = 0; warp < WARPS && r < RT; r++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                all[(warp * ROWS + r * TILE + lane / 4 + e / 2 * 8) * PITCH_SUM + n * 8 + lane % 4 * 2 + e % 2] =
                    sums[r][n][e];
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * count; i += THREADS) {
        const int r = i % ROWS, m = i / ROWS, row = first_tile * TILE + r;
        if (row < rows) {
            float sum = OUTLIERS ? corrections[r * TOKENS + m] : 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += all[(w * ROWS + r) * PITCH_SUM + m];
            out[(u64)(first_token + m) * rows + row] = (u16)T::pack(sum, 0.0f);
        }
    }
}

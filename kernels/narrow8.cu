// out[tokens, rows] = x[tokens, columns] W^T with both sides in 8 bits, for few tokens: as fast as the weights can be
// read. As narrow.cu: a block owns RT tiles of 16 rows and TOKENS = 8 NT tokens, its warps share out the chunks of
// columns, and each keeps DEPTH of them on their way, codes in registers and inputs in shared memory of its own. Sums are
// whole numbers, exact in any order. The outlier columns are further chunks, of 16-bit numbers, which are summed in
// float32 beside them.
//
// Macros: T: Half or BFloat, the type of out and of outliers; NT, RT, WARPS, DEPTH; OUTLIERS: 1 if there are such columns.
#include "codes8.cuh"

constexpr int TOKENS = 8 * NT, ROWS = RT * TILE;
constexpr int PITCH_X = INPUT_BYTES + 16;     // bytes of a token's chunk in shared memory: rows fall on different banks
constexpr int PITCH_SUM = TOKENS + 1;          // numbers
constexpr int COPIES = TOKENS / 4;             // of 16 bytes of every fourth token, by a lane
constexpr int OUTPUTS = (ROWS * TOKENS + WARPS * 32 - 1) / (WARPS * 32);  // that a thread writes at the end

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    narrow8(const u8* codes, const u8* outliers, const float* scales, const u8* x, const float* x_scales, u16* out,
            int tokens, int rows, int chunks, int outlier_chunks) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float row_scale[ROWS], token_scale[TOKENS];
    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    const int tiles = (rows + TILE - 1) / TILE, first_tile = blockIdx.x * RT, first_token = blockIdx.y * TOKENS;
    const int count = min(TOKENS, tokens - first_token), all = chunks + outlier_chunks;
    const u64 token_bytes = (u64)all * INPUT_BYTES;
    const int slot = min(TOKENS, tokens) * PITCH_X;

    // The warp takes chunks warp, warp + WARPS, ..., the outlier columns' after the others.
    const u8* mine[RT];  // where its lane finds its part of the next one to be asked for
    int next = warp;
    auto find = [&]() {
#pragma unroll
        for (int r = 0; r < RT; r++) {
            const u64 tile = min(first_tile + r, tiles - 1);
            const u8* chunk = OUTLIERS && next >= chunks ? outliers + (tile * outlier_chunks + (next - chunks)) * WEIGHT_BYTES
                                                         : codes + (tile * chunks + next) * WEIGHT_BYTES;
            mine[r] = chunk + Words<8>::place(lane);
        }
    };
    find();
    const u32 own = shared_address(shared) + warp * DEPTH * slot;
    const u32 to = own + lane / 8 * PITCH_X + lane % 8 * 16;
    const u8* next_x = x + (first_token + lane / 8) * token_bytes + warp * INPUT_BYTES + lane % 8 * 16;
    const u64 four_tokens = 4 * token_bytes;

    Words<8> held[DEPTH][RT];
    auto request = [&](int d) {
        if (next < all) {
#pragma unroll
            for (int r = 0; r < RT; r++) held[d][r].stream(mine[r], lane);
#pragma unroll
            for (int j = 0; j < COPIES; j++)
                if (4 * j + lane / 8 < count) copy16(to + d * slot + j * 4 * PITCH_X, next_x + j * four_tokens, true);
        }
        next += WARPS;
        next_x += WARPS * INPUT_BYTES;
        if (OUTLIERS && next >= chunks) {
            find();
        } else {
#pragma unroll
            for (int r = 0; r < RT; r++) mine[r] += WARPS * WEIGHT_BYTES;
        }
        copies_commit();
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) request(d);
    for (int i = threadIdx.x; i < ROWS; i += WARPS * 32) row_scale[i] = scales[min(first_tile * TILE + i, rows - 1)];
    for (int i = threadIdx.x; i < TOKENS; i += WARPS * 32) token_scale[i] = x_scales[min(first_token + i, tokens - 1)];

    int sums[RT][NT][4] = {};
    float beside[RT][NT][4] = {};  // of the outlier columns
    u32 at[NT];  // where a lane finds its row of a matrix of inputs; tokens past the last read it again, for nothing
#pragma unroll
    for (int n = 0; n < NT; n++) at[n] = own + min(n * 8 + lane % 8, count - 1) * PITCH_X + lane / 8 * 16;
    for (int chunk = warp; chunk < all;) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++, chunk += WARPS) {
            if (chunk >= all) break;
            copies_wait<DEPTH - 1>();
            __syncwarp();
#pragma unroll
            for (int s = 0; s < STEPS8; s += 2) {
                u32 b[NT][4];  // inputs of two steps
#pragma unroll
                for (int n = 0; n < NT; n++) load_matrices(b[n], at[n] + d * slot + s * 32);
#pragma unroll
                for (int e = 0; e < 2; e++)
#pragma unroll
                    for (int r = 0; r < RT; r++)
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            const u32* a = held[d][r].w + 4 * (s + e);
                            if (OUTLIERS && chunk >= chunks) {
                                T::mma(beside[r][n], a, b[n][2 * e], b[n][2 * e + 1]);
                            } else {
                                multiply8(sums[r][n], a, b[n][2 * e], b[n][2 * e + 1]);
                            }
                        }
            }
            __syncwarp();
            request(d);
        }
    }

    copies_wait<0>();
    // The warps' sums are added up through the inputs' place, first of whole numbers, then of the outliers' floats.
    auto collect = [&](auto* place, const auto& parts, auto* totals) {
        __syncthreads();  // nobody uses the place
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    place[(warp * ROWS + r * TILE + lane / 4 + e / 2 * 8) * PITCH_SUM + n * 8 + lane % 4 * 2 + e % 2] =
                        parts[r][n][e];
        __syncthreads();
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            const int i = threadIdx.x + o * WARPS * 32, r = i % ROWS, m = i / ROWS;
            totals[o] = 0;
            if (m < count) {
#pragma unroll
                for (int w = 0; w < WARPS; w++) totals[o] += place[(w * ROWS + r) * PITCH_SUM + m];
            }
        }
    };
    int whole_sums[OUTPUTS];
    float float_sums[OUTPUTS] = {};
    collect((int*)shared, sums, whole_sums);
    if (OUTLIERS) collect((float*)shared, beside, float_sums);
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) {
        const int i = threadIdx.x + o * WARPS * 32, r = i % ROWS, m = i / ROWS, row = first_tile * TILE + r;
        if (m < count && row < rows) {
            const float scaled = (float)whole_sums[o] * token_scale[m];
            const float sum = OUTLIERS ? fmaf(scaled, row_scale[r], float_sums[o]) : scaled * row_scale[r];
            out[(u64)(first_token + m) * rows + row] = (u16)T::pack(sum, 0.0f);
        }
    }
}

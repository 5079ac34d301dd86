// out[tokens, rows] = x[tokens, columns] W^T with both sides in 8 bits, for few tokens: as fast as the weights can be
// read. As narrow.cu: a block owns RT tiles of 16 rows and TOKENS = 8 NT tokens, its warps share out the chunks of
// columns, and each keeps DEPTH of them on their way, codes in registers and inputs in shared memory of its own. Sums
// are whole numbers, exact in any order. The outlier columns are further chunks, of 16-bit numbers, which are summed in
// float32 beside them. The end is (sum * token's scale) * row's scale + outliers, rounded to T.
//
// Macros: T: Half or BFloat, the type of out and of outliers; NT, RT, WARPS, DEPTH; OUTLIERS: 1 if there are any.
#include "codes8.cuh"

constexpr int TOKENS = 8 * NT, ROWS = RT * TILE;
constexpr int PITCH_X = INPUT_BYTES + 16;  // bytes of a token's chunk in shared memory: rows fall on different banks
constexpr int PITCH_SUM = TOKENS + 1;      // numbers
constexpr int COPIES = TOKENS / 4;         // by a lane
constexpr int OUTPUTS = (ROWS * TOKENS + WARPS * 32 - 1) / (WARPS * 32);  // that a thread writes at the end
static_assert(ROWS <= WARPS * 32 && TOKENS <= WARPS * 32, "a thread has a row's scale and a token's");

// Add up what the warps have, through the inputs' place: a thread's outputs.
template <class Number>
DEVICE void collect(Number* place, const Number (&parts)[RT][NT][4], Number* totals, int warp, int count) {
    const int lane = threadIdx.x % 32;
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
}

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

    // The warp takes chunks warp, warp + WARPS, ..., the outlier columns' after the others. A lane copies 16 bytes of
    // every fourth token.
    const u32 own = shared_address(shared) + warp * DEPTH * slot;
    const u32 to = own + lane / 8 * PITCH_X + lane % 8 * 16;
    const u8* from = x + (first_token + lane / 8) * token_bytes + lane % 8 * 16;
    Words<8> held[DEPTH][RT];
    auto fetch_weights = [&](int d, int chunk) {
        if (chunk >= all) return;
#pragma unroll
        for (int r = 0; r < RT; r++) {
            const int tile = min(first_tile + r, tiles - 1);
            const u8* part = part_of(codes, tile, chunk, chunks);
            if (OUTLIERS && chunk >= chunks) part = part_of(outliers, tile, chunk - chunks, outlier_chunks);
            held[d][r].stream(part + Words<8>::place(lane), lane);
        }
    };
    auto fetch_inputs = [&](int d, int chunk) {
#pragma unroll
        for (int j = 0; j < COPIES; j++)
            if (chunk < all && 4 * j + lane / 8 < count)
                copy16(to + d * slot + j * 4 * PITCH_X, from + 4 * j * token_bytes + chunk * INPUT_BYTES, true);
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < DEPTH * RT; i++) {
        const int chunk = warp + i / RT * WARPS;
        if (chunk < chunks)
            prefetch_chunk<WEIGHT_BYTES>(part_of(codes, min(first_tile + i % RT, tiles - 1), chunk, chunks), lane);
    }
    wait_for_previous();
#pragma unroll
    for (int d = 0; d < DEPTH; d++) fetch_weights(d, warp + d * WARPS);
    float own_row = 0, own_token = 0;  // scales; they are needed at the end
    if (threadIdx.x < ROWS) own_row = scales[min(first_tile * TILE + (int)threadIdx.x, rows - 1)];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) fetch_inputs(d, warp + d * WARPS);
    if (threadIdx.x < TOKENS) own_token = x_scales[min(first_token + (int)threadIdx.x, tokens - 1)];

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
            fetch_weights(d, chunk + DEPTH * WARPS);
            fetch_inputs(d, chunk + DEPTH * WARPS);
        }
    }
    next_may_begin();

    copies_wait<0>();
    if (threadIdx.x < ROWS) row_scale[threadIdx.x] = own_row;
    if (threadIdx.x < TOKENS) token_scale[threadIdx.x] = own_token;
    int whole_sums[OUTPUTS];
    float float_sums[OUTPUTS] = {};
    collect((int*)shared, sums, whole_sums, warp, count);
    if (OUTLIERS) collect((float*)shared, beside, float_sums, warp, count);
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

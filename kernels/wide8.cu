// out[tokens, rows] = x[tokens, columns] W^T with both sides in 8 bits, for many tokens, on Hopper.
//
// As wide.cu: a block makes 128 rows times TOKENS tokens, one thread has chunks of inputs and of codes copied into a ring
// of STAGES places in shared memory, two warpgroups of 64 rows each multiply them. Codes go from the ring into registers
// and from there into the tensor cores, half a chunk while the half before is under way. The outlier columns are further
// chunks, of 16-bit numbers: when they come, the sums become floats, scaled, and go on in float32. SPLIT blocks, a
// cluster, share out the chunks of one result; their sums are whole numbers, and of those with outliers floats that are
// added up always in the same order.
//
// Macros: T: Half or BFloat, the type of out and of outliers; TOKENS: 16, 32, 64, 128 or 256; STAGES: 2 or more; SPLIT:
// 1, 2, 4 or 8; BLOCKS: that share a multiprocessor; OUTLIERS: 1 if there are such columns.
#include "codes8.cuh"
#include "hopper8.cuh"

constexpr int ROWS = 128, TILES = ROWS / TILE, PRODUCERS = 128, CONSUMERS = 256;
constexpr int X_BYTES = TOKENS * INPUT_BYTES, STAGE_BYTES = X_BYTES + TILES * WEIGHT_BYTES;
constexpr int PITCH_SUM = ROWS + 4;       // numbers a token
constexpr int PITCH_OUT = ROWS * 2 + 16;  // bytes a token
constexpr int GROUP = 16;                 // row blocks that follow each other, then the next tokens
constexpr int FEW_REGISTERS = BLOCKS == 1 ? 40 : BLOCKS == 2 ? 32 : 24;  // of a thread that copies
constexpr int MANY_REGISTERS = BLOCKS == 1 ? 232 : BLOCKS == 2 ? 104 : 72;

extern "C" __global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__(PRODUCERS + CONSUMERS, BLOCKS)
    wide8(const u8* codes, const u8* outliers, const float* scales, const __grid_constant__ Boxes x,
          const float* x_scales, u16* out, int tokens, int rows, int chunks, int outlier_chunks) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 full[STAGES], empty[STAGES];
    __shared__ __align__(16) float token_scale[TOKENS];
    const int tiles = (rows + TILE - 1) / TILE, all = chunks + outlier_chunks;
    const int rank = blockIdx.z;  // in the cluster

    // which rows and tokens
    const int row_blocks = (rows + ROWS - 1) / ROWS, token_blocks = (tokens + TOKENS - 1) / TOKENS;
    const int id = blockIdx.x, group = id / (GROUP * token_blocks);
    const int wide_group = min(GROUP, row_blocks - group * GROUP), within = id - group * GROUP * token_blocks;
    const int first_tile = (group * GROUP + within % wide_group) * TILES;
    const int first_token = within / wide_group * TOKENS;

    // which columns: chunks begin .. end - 1, of which those from `turn` on are outliers
    const int each = (all + SPLIT - 1) / SPLIT, begin = min(all, rank * each), end = min(all, begin + each);
    const int turn = OUTLIERS ? max(begin, min(chunks, end)) : end;

    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, CONSUMERS / 32);
        }
        barrier_init_done();
    }
    for (int i = threadIdx.x; i < TOKENS; i += PRODUCERS + CONSUMERS)
        token_scale[i] = x_scales[min(first_token + i, tokens - 1)];
    __syncthreads();

    if (warp < PRODUCERS / 32) {
        registers_less<FEW_REGISTERS>();
        if (threadIdx.x == 0) {
            for (int i = 0; i < end - begin; i++) {
                const int stage = i % STAGES, chunk = begin + i;
                if (i >= STAGES) barrier_wait(empty + stage, (i / STAGES - 1) & 1);
                const u32 place = shared_address(shared + stage * STAGE_BYTES);
                barrier_expect(full + stage, STAGE_BYTES);
                copy_box(place, &x, first_token, chunk * INPUT_BYTES, full + stage);
                const bool whole = !OUTLIERS || chunk < chunks;
                const u8* from = whole ? codes + (u64)chunk * WEIGHT_BYTES : outliers + (u64)(chunk - chunks) * WEIGHT_BYTES;
                const u64 row = (u64)(whole ? chunks : outlier_chunks) * WEIGHT_BYTES;
                for (int t = 0; t < TILES; t++)  // tiles past the last fetch it again, for nothing
                    copy_run(place + X_BYTES + t * WEIGHT_BYTES, from + min(first_tile + t, tiles - 1) * row, WEIGHT_BYTES,
                             full + stage);
            }
        }
        __syncwarp();
        if (SPLIT > 1) {
            cluster_sync();
            cluster_sync();
        }
    } else {
        registers_more<MANY_REGISTERS>();
        const int mine = warp - PRODUCERS / 32;  // its tile of the block
        u32 a[2][8] = {};
        // Multiply chunks from .. to - 1: `add` is told four words of a step's weights and where its inputs are.
        auto multiply = [&](int from, int to, auto add) {
#pragma unroll 1
            for (int i = from - begin; i < to - begin; i++) {
                const int stage = i % STAGES;
                const u8* place = shared + stage * STAGE_BYTES;
                const u8* weights = place + X_BYTES + mine * WEIGHT_BYTES + lane * 16;
                const u64 inputs = swizzled_rows(place);
                barrier_wait(full + stage, i / STAGES & 1);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    products_wait<1>();  // the half chunk before the last is done: its registers are free
#pragma unroll
                    for (int e = 0; e < 8; e++) still_used(a[h][e]);
                    if (h == 1 && i > from - begin && lane == 0) barrier_arrive(empty + (i - 1) % STAGES);
#pragma unroll
                    for (int s = 0; s < 2; s++) {
                        const uint4 v = *(const uint4*)(weights + (2 * h + s) * 512);
                        a[h][4 * s] = v.x, a[h][4 * s + 1] = v.y, a[h][4 * s + 2] = v.z, a[h][4 * s + 3] = v.w;
                    }
                    products_begin();
#pragma unroll
                    for (int s = 0; s < 2; s++) add(a[h] + 4 * s, inputs + (2 * h + s) * (32 / 16));
                    products_commit();
                }
            }
            products_wait<0>();
            if (to > from && lane == 0) barrier_arrive(empty + (to - 1 - begin) % STAGES);
        };
        int sums[TOKENS / 2] = {};
        multiply(begin, turn, [&](const u32* weights, u64 inputs) { Product8<TOKENS>::add(sums, weights, inputs); });

        // What a thread has: rows `row` and row + 8, of every 8 tokens two.
        const int row = mine * TILE + lane / 4, first_row = first_tile * TILE;
        const float row_scale[2] = {scales[min(first_row + row, rows - 1)], scales[min(first_row + row + 8, rows - 1)]};
        float values[TOKENS / 2];
        auto scale = [&]() {
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i++) {
                const float2 two = *(const float2*)(token_scale + i * 8 + lane % 4 * 2);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    values[4 * i + e] = (float)sums[4 * i + e] * (e % 2 ? two.y : two.x) * row_scale[e / 2];
            }
        };
        if (SPLIT == 1 || (OUTLIERS && end > turn)) {
            scale();
            if (OUTLIERS)
                multiply(turn, end, [&](const u32* weights, u64 inputs) { Product<T, TOKENS>::add(values, weights, inputs); });
        }
        barrier_some(1, CONSUMERS);  // nobody reads the ring any more

        const int t = threadIdx.x - PRODUCERS, live = min(TOKENS, tokens - first_token);
        if (SPLIT == 1) {
            const u32 to_shared = shared_address(shared) + (lane / 16 * 8 + lane % 8) * PITCH_OUT +
                                  (mine * TILE + lane / 8 % 2 * 8) * 2;
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i += 2) {
                const float* v = values + 4 * i;
                store_transposed(to_shared + i * 8 * PITCH_OUT, T::pack(v[0], v[1]), T::pack(v[2], v[3]),
                                 T::pack(v[4], v[5]), T::pack(v[6], v[7]));
            }
            barrier_some(1, CONSUMERS);
            const int there = min(ROWS, rows - first_row);
            u16* to = out + (u64)first_token * rows + first_row;
            if (there == ROWS && rows % 8 == 0) {
                for (int p = t; p < live * (ROWS / 8); p += CONSUMERS)
                    *(uint4*)(to + (u64)(p / 16) * rows + p % 16 * 8) =
                        *(const uint4*)(shared + p / 16 * PITCH_OUT + p % 16 * 16);
            } else {
                for (int p = t; p < live * ROWS; p += CONSUMERS)
                    if (p % ROWS < there)
                        to[(u64)(p / ROWS) * rows + p % ROWS] = *(const u16*)(shared + p / ROWS * PITCH_OUT + p % ROWS * 2);
            }
        } else {
            u32* partial = (u32*)shared;
            const bool floats = OUTLIERS && end > turn;
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    partial[(i * 8 + lane % 4 * 2 + e % 2) * PITCH_SUM + row + e / 2 * 8] =
                        floats ? __float_as_uint(values[4 * i + e]) : (u32)sums[4 * i + e];
            cluster_sync();
            const int quads = ROWS / 4;  // each block adds up every SPLIT-th token
            for (int p = t; p < (live - rank + SPLIT - 1) / SPLIT * quads; p += CONSUMERS) {
                const int m = rank + p / quads * SPLIT, r = p % quads * 4;
                int whole[4] = {};
                float beside[4] = {};  // of blocks that had outliers
#pragma unroll
                for (int k = 0; k < SPLIT; k++) {
                    const float4 v = read_cluster((const float*)partial + m * PITCH_SUM + r, k);
                    const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        if (OUTLIERS && min(all, (k + 1) * each) > max(chunks, k * each)) {
                            beside[e] += four[e];
                        } else {
                            whole[e] += (int)__float_as_uint(four[e]);
                        }
                    }
                }
                float sum[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float scaled = (float)whole[e] * token_scale[m];
                    const float row_scale = scales[min(first_row + r + e, rows - 1)];
                    sum[e] = OUTLIERS ? fmaf(scaled, row_scale, beside[e]) : scaled * row_scale;
                }
                const u32 first = T::pack(sum[0], sum[1]), second = T::pack(sum[2], sum[3]);
                const u16 four[4] = {(u16)first, (u16)(first >> 16), (u16)second, (u16)(second >> 16)};
                u16* to = out + (u64)(first_token + m) * rows + first_row + r;
                if (rows % 4 == 0 && first_row + r < rows) {
                    *(uint2*)to = make_uint2(first, second);
                } else {
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (first_row + r + e < rows) to[e] = four[e];
                }
            }
            cluster_sync();  // nobody leaves while another reads its sums
        }
    }
}

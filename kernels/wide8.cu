// out[tokens, rows] = x[tokens, columns] W^T with both sides in 8 bits, for many tokens, on Hopper.
//
// A block makes 128 rows times TOKENS tokens. One thread has chunks of inputs and of codes copied into a ring of STAGES
// places in shared memory; two warpgroups, of 64 rows each, take their codes from there into registers, which the
// tensor cores multiply as they are: a step is fetched while the two before it are under way. The outlier columns are
// further chunks, of 16-bit numbers: when they come, the sums become floats, scaled, and go on in float32.
//
// SPLIT blocks, a cluster, share out the chunks of one result. Their sums are whole numbers, exact in any order; those
// of blocks that had outliers are floats, added up always in the same order.
//
// Macros: T: Half or BFloat, the type of out and of outliers; TOKENS: 16, 32, 64, 128 or 256; STAGES: 3 or more; SPLIT:
// 1, 2, 4 or 8; BLOCKS: that share a multiprocessor, 1, or 2 for up to 64 tokens; OUTLIERS: 1 if there are any.
#include "codes8.cuh"
#include "hopper8.cuh"
#include "ring.cuh"

constexpr int ROWS = 128, TILES = ROWS / TILE, CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int X_BYTES = TOKENS * INPUT_BYTES, STAGE_BYTES = X_BYTES + TILES * WEIGHT_BYTES;
constexpr int PITCH_SUM = ROWS + 4;       // numbers a token
constexpr int PITCH_OUT = ROWS * 2 + 16;  // bytes a token
constexpr int GROUP = 16;                 // row blocks that follow each other, then the next tokens
// A block's registers: THREADS times 168, or 80 with two blocks. The threads that only copy leave theirs to the others.
constexpr int FEW_REGISTERS = BLOCKS == 1 ? 56 : 48, MANY_REGISTERS = BLOCKS == 1 ? 224 : 96;

extern "C" __global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__(THREADS, BLOCKS)
    wide8(const u8* codes, const u8* outliers, const float* scales, const __grid_constant__ Boxes x,
          const float* x_scales, u16* out, int tokens, int rows, int chunks, int outlier_chunks) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 full[STAGES], empty[STAGES];
    __shared__ __align__(16) float token_scale[TOKENS];
    const int tiles = (rows + TILE - 1) / TILE, last_band = (tiles - 1) / BAND * BAND, all = chunks + outlier_chunks;

    // which rows and tokens
    const int row_blocks = (rows + ROWS - 1) / ROWS;
    const int token_blocks = (tokens + TOKENS - 1) / TOKENS;
    const int id = blockIdx.x, group = id / (GROUP * token_blocks);
    const int wide_group = min(GROUP, row_blocks - group * GROUP), within = id - group * GROUP * token_blocks;
    const int first_tile = (group * GROUP + within % wide_group) * TILES, first_row = first_tile * TILE;
    const int first_token = within / wide_group * TOKENS;

    // which columns: chunks begin .. end - 1, of which those from `turn` on are outliers
    const int rank = blockIdx.z, each = (all + SPLIT - 1) / SPLIT;
    const int begin = min(all, rank * each), end = min(all, begin + each);
    const int turn = OUTLIERS ? max(begin, min(chunks, end)) : end;

    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    // weights of a chunk, or outliers, from tile t of the block on; a band past the last is that again, for nothing
    auto band_of = [&](int chunk, int t) {
        const int band = min(first_tile + t, last_band);
        return OUTLIERS && chunk >= chunks ? part_of(outliers, band, chunk - chunks, outlier_chunks)
                                           : part_of(codes, band, chunk, chunks);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < min(STAGES, end - begin); i++)
            for (int t = 0; t < TILES; t += BAND) prefetch_run(band_of(begin + i, t), BAND * WEIGHT_BYTES);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, CONSUMERS / 32 * ARRIVALS);
        }
        barrier_init_done();
    }
    wait_for_previous();
    next_may_begin();  // on multiprocessors that have room: it has its codes fetched meanwhile
    __syncthreads();

    if (warp >= CONSUMERS / 32) {
        if (ARRIVALS == 1) registers_less<FEW_REGISTERS>();
        if (threadIdx.x == CONSUMERS) {
            for (int i = 0; i < end - begin; i++) {
                const int stage = i % STAGES, chunk = begin + i;
                const u32 place = shared_address(shared + stage * STAGE_BYTES);
                if (i >= STAGES) barrier_wait(empty + stage, (i / STAGES - 1) & 1);
                barrier_expect(full + stage, STAGE_BYTES);
                for (int t = 0; t < TILES; t += BAND)
                    copy_run(place + X_BYTES + t * WEIGHT_BYTES, band_of(chunk, t), BAND * WEIGHT_BYTES, full + stage);
                copy_box(place, &x, first_token, chunk * (INPUT_BYTES / 2), full + stage);  // in 16-bit numbers
            }
        }
        __syncwarp();
        if (SPLIT > 1) {
            cluster_sync();
            cluster_sync();
        }
    } else {
        if (ARRIVALS == 1) registers_more<MANY_REGISTERS>();
        if (threadIdx.x < TOKENS) token_scale[threadIdx.x] = x_scales[min(first_token + (int)threadIdx.x, tokens - 1)];
        barrier_some(1, CONSUMERS);
        // What a thread gets: of every 8 tokens two, of rows `row` and row + 8.
        const int row = warp * TILE + lane / 4;
        const float row_scale[2] = {scales[min(first_row + row, rows - 1)], scales[min(first_row + row + 8, rows - 1)]};
        u32 a[STEPS8][4];  // four steps' weights: only so can ptxas keep products under way from one turn to the next
        auto fetch = [&](int i, int step) {
            const u8* weights = shared + i % STAGES * STAGE_BYTES + X_BYTES + warp * WEIGHT_BYTES;
            const uint4 v = *(const uint4*)(weights + step * 512 + lane * 16);
            a[step][0] = v.x, a[step][1] = v.y, a[step][2] = v.z, a[step][3] = v.w;
        };
        auto wait_full = [&](int i) { barrier_wait(full + i % STAGES, i / STAGES & 1); };
        auto release = [&](int i) {
            __syncwarp();  // the other lanes have read, too
            if (lane < ARRIVALS) barrier_arrive(empty + i % STAGES);
        };
        const int count = turn - begin;
        int sums[TOKENS / 2] = {};
        if (count > 0) {
            wait_full(0);
            fetch(0, 0);
#pragma unroll 1
            for (int i = 0; i < count; i++) {
                const u64 inputs = swizzled_rows(shared + i % STAGES * STAGE_BYTES);
#pragma unroll
                for (int s = 0; s < STEPS8; s++) {
                    products_begin();
                    Product8<TOKENS>::add(sums, a[s], inputs + s * (32 / 16));
                    products_commit();
                    products_wait<2>();  // all but this and the one before it are done
                    if (s == 1 && i > 0) release(i - 1);
                    if (s + 1 < STEPS8) {
                        fetch(i, s + 1);
                    } else if (i + 1 < count) {
                        wait_full(i + 1);
                        fetch(i + 1, 0);
                    }
                }
            }
            products_wait<0>();
            release(count - 1);
        }
        if (SPLIT == 1 || (OUTLIERS && end > turn)) {  // from here on `sums` holds the bits of floats
            float values[TOKENS / 2];
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i++) {
                const float2 two = *(const float2*)(token_scale + i * 8 + lane % 4 * 2);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    values[4 * i + e] = (float)sums[4 * i + e] * (e % 2 ? two.y : two.x) * row_scale[e / 2];
            }
#pragma unroll 1
            for (int i = count; OUTLIERS && i < end - begin; i++) {
                const u64 inputs = swizzled_rows(shared + i % STAGES * STAGE_BYTES);
                wait_full(i);
#pragma unroll
                for (int s = 0; s < STEPS8; s++) fetch(i, s);
                products_begin();
#pragma unroll
                for (int s = 0; s < STEPS8; s++) Product<T, TOKENS>::add(values, a[s], inputs + s * (32 / 16));
                products_commit();
                products_wait<0>();
                release(i);
            }
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) sums[i] = (int)__float_as_uint(values[i]);
        }
        barrier_some(1, CONSUMERS);  // nobody reads the ring any more

        const int live = min(TOKENS, tokens - first_token);
        if (SPLIT == 1) {
            const u32 place = shared_address(shared) + (lane / 16 * 8 + lane % 8) * PITCH_OUT +
                              (warp * TILE + lane / 8 % 2 * 8) * 2;
            auto two = [&](int i) { return T::pack(__uint_as_float(sums[i]), __uint_as_float(sums[i + 1])); };
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i += 8)  // 16 tokens
                store_transposed(place + i * 2 * PITCH_OUT, two(i), two(i + 2), two(i + 4), two(i + 6));
            barrier_some(1, CONSUMERS);
            const int there = min(ROWS, rows - first_row);
            u16* to = out + (u64)first_token * rows + first_row;
            if (there == ROWS && rows % 8 == 0) {
                for (int p = threadIdx.x; p < live * (ROWS / 8); p += CONSUMERS)
                    *(uint4*)(to + (u64)(p / 16) * rows + p % 16 * 8) =
                        *(const uint4*)(shared + p / 16 * PITCH_OUT + p % 16 * 16);
            } else {
                for (int p = threadIdx.x; p < live * ROWS; p += CONSUMERS)
                    if (p % ROWS < there)
                        to[(u64)(p / ROWS) * rows + p % ROWS] =
                            *(const u16*)(shared + p / ROWS * PITCH_OUT + p % ROWS * 2);
            }
        } else {
            u32* partial = (u32*)shared;
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    partial[(i * 8 + lane % 4 * 2 + e % 2) * PITCH_SUM + row + e / 2 * 8] = (u32)sums[4 * i + e];
            cluster_sync();
            const int quads = ROWS / 4;  // each block adds up every SPLIT-th token
            for (int p = threadIdx.x; p < (live - rank + SPLIT - 1) / SPLIT * quads; p += CONSUMERS) {
                const int m = rank + p / quads * SPLIT, r = p % quads * 4;
                int whole[4] = {};
                float beside[4] = {};  // of blocks that had outliers
#pragma unroll
                for (int k = 0; k < SPLIT; k++) {
                    const float4 v = read_cluster((const float*)partial + m * PITCH_SUM + r, k);
                    const float four[4] = {v.x, v.y, v.z, v.w};
                    const bool floats = OUTLIERS && min(all, (k + 1) * each) > max(chunks, k * each);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        whole[e] += floats ? 0 : (int)__float_as_uint(four[e]);
                        beside[e] += floats ? four[e] : 0;
                    }
                }
                u16 four[4];
                u16* to = out + (u64)(first_token + m) * rows + first_row + r;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float sum = (float)whole[e] * token_scale[m], own = scales[min(first_row + r + e, rows - 1)];
                    four[e] = (u16)T::pack(OUTLIERS ? fmaf(sum, own, beside[e]) : sum * own, 0.0f);
                }
                if (rows % 4 == 0 && first_row + r < rows) {
                    *(uint2*)to = make_uint2(four[0] | (u32)four[1] << 16, four[2] | (u32)four[3] << 16);
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

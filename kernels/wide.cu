// out[tokens, rows] = x[tokens, columns] W^T for many tokens, on Hopper: as fast as its tensor cores, the weights packed.
//
// A block makes 128 rows times TOKENS tokens. One thread has chunks of 128 columns of x and of the codes copied into a
// ring of STAGES places in shared memory; two warpgroups, of 64 rows each, turn their codes into 16-bit floats in
// registers, which the tensor cores take as they are, and x from the ring. The next step's floats are made while this
// one's product is under way. For few tokens that takes longer than the product: with PHASES of 2 there are two such
// pairs of warpgroups, which take turns. SPLIT blocks, a cluster, share out the columns of one result. All add their
// sums up at the end, always in the same order.
//
// Macros: KIND and what it asks for (weights.cuh); T: Half or BFloat, the type of x and out; TOKENS: 8, 16, 32, 64, 128
// or 256; STAGES: 2 or more; SPLIT: 1, 2, 4 or 8; PHASES: 2 or 1; BLOCKS: that share a multiprocessor, 2 or 3 only
// with one phase and up to 64 and 16 tokens.
#include "hopper.cuh"
#include "ring.cuh"
#include "weights.cuh"

constexpr int ROWS = 128, TILES = ROWS / TILE, PRODUCERS = 128, PAIR = 256, CONSUMERS = PAIR * PHASES;
constexpr int X_BYTES = TOKENS * CHUNK * 2, HALF_BYTES = X_BYTES / 2;  // two halves of 64 columns, 128 bytes a token
constexpr int CODE_BYTES = Words<BITS>::BYTES;
constexpr int STAGE_BYTES = X_BYTES + (TILES * CODE_BYTES + 1023) / 1024 * 1024;
constexpr int PITCH_SUM = ROWS + 4;     // floats a token
constexpr int PITCH_OUT = ROWS * 2 + 16;  // bytes a token
constexpr int GROUP = 16;               // clusters that follow each other take so many row blocks, then the next tokens
constexpr int FEW_REGISTERS = BLOCKS == 3 ? 24 : BLOCKS * PHASES == 2 ? 32 : 40;  // of a thread that copies
constexpr int MANY_REGISTERS = BLOCKS == 3 ? 72 : BLOCKS == 2 ? 104 : PHASES == 2 ? 112 : 232;

extern "C" __global__ void __cluster_dims__(1, 1, SPLIT) __launch_bounds__(PRODUCERS + CONSUMERS, BLOCKS)
    wide(const u8* codes, const u8* scales, const u8* offsets, const u8* table, const __grid_constant__ Boxes x, u16* out,
         int tokens, int rows, int columns, int chunks, int shift) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 full[STAGES], empty[STAGES];
    u8* stages = shared;
    u8* tables = shared + STAGES * STAGE_BYTES;
    const Layer layer = {codes, scales, offsets, table, chunks, shift};
    const int tiles = (rows + TILE - 1) / TILE, last_band = (tiles - 1) / BAND * BAND;
    const int rank = blockIdx.z;  // in the cluster

    // which rows and tokens
    const int row_blocks = (rows + ROWS - 1) / ROWS, token_blocks = (tokens + TOKENS - 1) / TOKENS;
    const int id = blockIdx.x, group = id / (GROUP * token_blocks);
    const int wide_group = min(GROUP, row_blocks - group * GROUP), within = id - group * GROUP * token_blocks;
    const int first_tile = (group * GROUP + within % wide_group) * TILES;
    const int first_token = within / wide_group * TOKENS;

    // which columns: chunks begin .. begin + count - 1
    const int each = (chunks + SPLIT - 1) / SPLIT, begin = min(chunks, rank * each);
    const int count = min(chunks, begin + each) - begin;

    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    // codes of a chunk, from tile t of the block on; a band past the last is that again, for nothing
    auto band = [&](int chunk, int t) {
        return layer.row(min(first_tile + t, last_band), CODE_BYTES) + (u64)chunk * (BAND * CODE_BYTES);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < min(STAGES, count); i++)
            for (int t = 0; t < TILES; t += BAND) prefetch_run(band(begin + i, t), BAND * CODE_BYTES);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, PAIR / 32 * ARRIVALS);
        }
        barrier_init_done();
    }
    if (KIND == TABLE) Weights<T>::prepare_weights(tables, layer, first_tile, PRODUCERS + CONSUMERS);
    wait_for_previous();
    next_may_begin();  // on multiprocessors that have room: it has its codes fetched meanwhile
    if (KIND == BOOK)
        for (int i = 0; i < TILES; i++)
            Weights<T>::prepare_weights(tables + i * Weights<T>::SHARED_WEIGHTS, layer, min(first_tile + i, tiles - 1),
                                        PRODUCERS + CONSUMERS);
    __syncthreads();

    if (warp < PRODUCERS / 32) {
        if (ARRIVALS == 1) registers_less<FEW_REGISTERS>();
        if (threadIdx.x == 0) {
            for (int i = 0; i < count; i++) {
                const int stage = i % STAGES, chunk = begin + i;
                if (i >= STAGES) barrier_wait(empty + stage, (i / STAGES - 1) & 1);
                const u32 place = shared_address(stages + stage * STAGE_BYTES);
                barrier_expect(full + stage, X_BYTES + TILES * CODE_BYTES);
                for (int t = 0; t < TILES; t += BAND)
                    copy_run(place + X_BYTES + t * CODE_BYTES, band(chunk, t), BAND * CODE_BYTES, full + stage);
                for (int h = 0; h < 2; h++)
                    copy_box(place + h * HALF_BYTES, &x, first_token, chunk * CHUNK + h * 64, full + stage);
            }
        }
        __syncwarp();
        if (SPLIT > 1) {
            cluster_sync();
            cluster_sync();
        }
    } else {
        if (ARRIVALS == 1) registers_more<MANY_REGISTERS>();
        const int phase = (warp - PRODUCERS / 32) / TILES, mine = (warp - PRODUCERS / 32) % TILES;  // its tile of the block
        const int tile = min(first_tile + mine, tiles - 1);
        const u8* own_table = KIND == BOOK ? tables + mine * Weights<T>::SHARED_WEIGHTS : tables;
        float sums[TOKENS / 2] = {};
        u32 a[2][4] = {};
        Weights<T> held, next;
        const typename Weights<T>::Place statistics(layer, tile, lane);
        if (phase < count) next.statistics(statistics, layer.index(begin + phase));
        for (int i = phase; i < count; i += PHASES) {
            const int stage = i % STAGES;
            const u8* place = stages + stage * STAGE_BYTES;
            held = next;
            held.settle();
            if (i + PHASES < count) next.statistics(statistics, layer.index(begin + i + PHASES));
            barrier_wait(full + stage, i / STAGES & 1);
            held.words.read(place + X_BYTES + mine * CODE_BYTES, lane);
            const u64 inputs = swizzled_rows(place);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                u32* now = a[s % 2];
                if (s > 1) products_wait<1>();  // the product before the last is done: its registers are free
#pragma unroll
                for (int e = 0; e < 4; e++) still_used(now[e]);
#pragma unroll
                for (int e = 0; e < 4; e++) now[e] = held.weight(own_table, 4 * s + e);
                products_begin();
                Product<T, TOKENS>::add(sums, now, inputs + (s / 4 * HALF_BYTES + s % 4 * 32) / 16);
                products_commit();
            }
            products_wait<0>();  // across chunks ptxas would not keep them apart; the other warpgroup fills the gap
            __syncwarp();  // the other lanes have read, too
            if (lane < ARRIVALS) barrier_arrive(empty + stage);
        }
        barrier_some(1, CONSUMERS);  // nobody reads the ring any more

        const int t = threadIdx.x - PRODUCERS;
        if (PHASES > 1) {
            float* others = (float*)shared + t % PAIR;
            if (phase == 1) {
#pragma unroll
                for (int e = 0; e < TOKENS / 2; e++) others[e * PAIR] = sums[e];
            }
            barrier_some(1, CONSUMERS);
            if (phase == 0) {
#pragma unroll
                for (int e = 0; e < TOKENS / 2; e++) sums[e] += others[e * PAIR];
            }
            barrier_some(1, CONSUMERS);
        }
        const int row = mine * TILE + lane / 4, live = min(TOKENS, tokens - first_token);
        if (SPLIT == 1) {
#pragma unroll
            for (int i = 0; phase == 0 && i < TOKENS / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    *(u16*)(shared + (i * 8 + lane % 4 * 2 + e % 2) * PITCH_OUT + (row + e / 2 * 8) * 2) =
                        (u16)T::pack(sums[4 * i + e], 0.0f);
            barrier_some(1, CONSUMERS);
            const int first_row = first_tile * TILE, there = min(ROWS, rows - first_row);
            u16* to = out + (u64)first_token * rows + first_row;  // there may be less than 1
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
            float* partial = (float*)shared;
#pragma unroll
            for (int i = 0; phase == 0 && i < TOKENS / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    partial[(i * 8 + lane % 4 * 2 + e % 2) * PITCH_SUM + row + e / 2 * 8] = sums[4 * i + e];
            cluster_sync();
            const int quads = ROWS / 4;  // each block adds up every SPLIT-th token
            const int first_row = first_tile * TILE;
            for (int p = t; p < (live - rank + SPLIT - 1) / SPLIT * quads; p += CONSUMERS) {
                const int m = rank + p / quads * SPLIT, r = p % quads * 4;
                float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
                for (int k = 0; k < SPLIT; k++) {
                    const float4 v = read_cluster(partial + m * PITCH_SUM + r, k);
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                const u32 first = T::pack(sum.x, sum.y), second = T::pack(sum.z, sum.w);
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

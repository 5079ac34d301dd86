// out[tokens, rows] = x[tokens, columns] W^T for few tokens: as fast as the packed weights can be read.
//
// A block owns RT * BESIDE tiles of 16 rows and TOKENS = 8 NT tokens. WARPS teams share out the columns by chunks of 128
// and add their sums up at the end, always in the same order. A team is BESIDE warps, each with RT tiles of its own, which
// use the same inputs: these have to be fetched once for all of them, and next to 16 tokens' inputs the codes are few
// bytes. Every team keeps DEPTH chunks on their way: codes in registers, inputs in shared memory of its own, so that no
// team waits for another before the end. Weights are the 16-row operand of the tensor cores, tokens the 8-column one.
// SPLIT blocks, a cluster (sm_90), share out the columns too.
//
// Single weights that are corrected from a list, in compressed sparse rows, are the work of four more warps meanwhile.
//
// With SPARSE, two of every four weights in a row are kept (tile.cuh), and a chunk is of 256 columns: the operand of a
// step is 32 of them.
//
// Macros: KIND and what it asks for (weights.cuh); T: Half or BFloat, the type of x and out; NT, RT, WARPS, DEPTH, BESIDE,
// SPLIT; OUTLIERS: 1 where there is such a list (`turned`: the inputs as [column][token], filled up to whole blocks);
// SPARSE.
#include "tile.cuh"
#include "hopper.cuh"

#ifndef OUTLIERS
#define OUTLIERS 0
#endif
#ifndef SPARSE
#define SPARSE 0
#endif

constexpr int TOKENS = 8 * NT, ROWS = BESIDE * RT * TILE, PART = ROWS / SPLIT;  // rows that a block of a cluster writes
constexpr int WIDTH = SPARSE ? 2 * CHUNK : CHUNK;  // columns of a chunk
constexpr int PITCH_X = WIDTH * 2 + 16;   // bytes of a token's inputs in shared memory: rows fall on different banks
constexpr int PITCH_SUM = TOKENS + 1;     // floats
constexpr int HELPERS = OUTLIERS ? 4 : 0, TEAM = BESIDE * 32, THREADS = WARPS * TEAM + HELPERS * 32;
constexpr int PIECES = WIDTH / 8, APART = TEAM / PIECES;  // a thread copies 8 columns of every so many tokens
constexpr int COPIES = (TOKENS + APART - 1) / APART;
typedef Tile<T, SPARSE> Held;
constexpr int CODE_BYTES = Held::BYTES;
// Scales are applied to sums over a group, or, where there are many sums and small groups, to the weights.
constexpr bool AFTER = NT == 1 || (NT == 2 && Weights<T>::GROUP_STEPS >= 4);

// The corrections of one row for every token, into to[TOKENS], by 16 lanes. Inputs are [column][token] for this, so that
// a weight finds those of eight tokens in one place.
DEVICE void correct(u32 begin, u32 end, const u16* columns, const u16* values, const u16* turned, u64 stride, float* to,
                    int lane) {
    float sums[TOKENS] = {};
#pragma unroll 2
    for (u32 i = begin + lane; i < end; i += 16) {
        const float value = T::low(values[i]);
        const uint4* inputs = (const uint4*)(turned + columns[i] * stride);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint4 v = inputs[n];
            const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int p = 0; p < 4; p++) {
                sums[8 * n + 2 * p] = fmaf(value, T::low(pairs[p]), sums[8 * n + 2 * p]);
                sums[8 * n + 2 * p + 1] = fmaf(value, T::high(pairs[p]), sums[8 * n + 2 * p + 1]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
#pragma unroll
        for (int step = 8; step; step >>= 1) sums[m] += __shfl_xor_sync(~0u, sums[m], step);
        if (lane == 0) to[m] = sums[m];
    }
}

// sums += scale part + offset total for one tile; part is cleared, and a total that is the tile's own.
DEVICE void finish_group(float (*sums)[4], float (*part)[4], float (*total)[4], const Weights<T>& held, int group) {
    float scale[2], offset[2] = {};
    held.group(group, 0, scale[0], offset[0]);
    held.group(group, 1, scale[1], offset[1]);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            sums[n][e] = fmaf(scale[e / 2], part[n][e], sums[n][e]);
            if (Weights<T>::HAS_OFFSET) sums[n][e] = fmaf(offset[e / 2], total[n][e], sums[n][e]);
            part[n][e] = 0;
            if (SPARSE) total[n][e] = 0;
        }
}

#if SPLIT > 1
#define CLUSTER __cluster_dims__(1, 1, SPLIT)
#else
#define CLUSTER
#endif

// Until all warps of the team are here.
DEVICE void meet(int team) {
    if (BESIDE == 1) {
        __syncwarp();
    } else {
        barrier_some(1 + team, TEAM);
    }
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS)
    narrow(const u8* codes, const u8* scales, const u8* offsets, const u8* table, const u32* outlier_rows,
           const u16* outlier_columns, const u16* outlier_values, const u16* turned, const u16* x, u16* out, int tokens,
           int rows, int columns, int chunks, int shift) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    const int team = warp / BESIDE, thread = threadIdx.x % TEAM;  // of the team
    const int tiles = (rows + TILE - 1) / TILE, first_token = blockIdx.y * TOKENS;
    const int block_tile = blockIdx.x * BESIDE * RT, first_tile = block_tile + warp % BESIDE * RT;
    const int count = min(TOKENS, tokens - first_token);
    const Layer layer = {codes, scales, offsets, table, chunks, shift};
    x += (u64)first_token * columns;

    // shared memory: tables, corrections, then inputs and (after them) sums in the same place
    constexpr int table_bytes = AFTER ? Weights<T>::SHARED_PAIRS : Weights<T>::SHARED_WEIGHTS;
    constexpr int tables = KIND == BOOK ? table_bytes * BESIDE * RT : table_bytes;
    float* corrections = (float*)(shared + tables);
    u8* inputs = shared + tables + (OUTLIERS ? PART * TOKENS * 4 : 0);
    const int slot = min(TOKENS, tokens) * PITCH_X;
    const u32 own = shared_address(inputs) + team * DEPTH * slot;

    // The team takes chunks `first`, first + STRIDE, ...; these point at the next one to be asked for.
    constexpr int STRIDE = WARPS * SPLIT;
    const int first = blockIdx.z * WARPS + team;
    int next = first;
    const u8* next_codes[RT];
#pragma unroll
    for (int r = 0; r < RT; r++)
        next_codes[r] = layer.row(min(first_tile + r, tiles - 1), CODE_BYTES) + first * (BAND * CODE_BYTES) +
                        Words<BITS>::place(lane);
    const u16* next_x = x + (u64)(thread / PIECES) * columns + first * WIDTH + thread % PIECES * 8;
    const u32 to = own + thread / PIECES * PITCH_X + thread % PIECES * 16;
    const u64 tokens_apart = APART * (u64)columns;

    Held held[DEPTH][RT];
    const int last = team < WARPS ? chunks : 0;  // helpers have no chunks
    auto request = [&](int d, bool again) {
        if (next < last) {
#pragma unroll
            for (int r = 0; r < RT; r++) {
                held[d][r].stream(next_codes[r], lane);
                next_codes[r] += STRIDE * BAND * CODE_BYTES;
            }
#pragma unroll
            for (int r = 0; r < RT; r++)
                held[d][r].weights.statistics(typename Weights<T>::Place(layer, min(first_tile + r, tiles - 1), lane), layer.index(next));
            if (again) meet(team);  // all have read what is there
            const bool inside = next * WIDTH + thread % PIECES * 8 < columns;
#pragma unroll
            for (int j = 0; j < COPIES; j++)
                if (APART * j + thread / PIECES < count)
                    copy16(to + d * slot + j * APART * PITCH_X, next_x + j * tokens_apart, inside);
        }
        next += STRIDE;
        next_x += STRIDE * WIDTH;
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < DEPTH * RT; i++)
        if (next + i / RT * STRIDE < last) {
            const u8* chunk = next_codes[i % RT] - Words<BITS>::place(lane);
            prefetch_chunk<CODE_BYTES>(chunk + i / RT * STRIDE * BAND * CODE_BYTES, lane);
        }
    auto prepare = [&](u8* place, int tile) {
        if (AFTER) {
            Weights<T>::prepare_pairs(place, layer, tile, THREADS);
        } else {
            Weights<T>::prepare_weights(place, layer, tile, THREADS);
        }
    };
    wait_for_previous();
    next_may_begin();  // where there is room: it has its first weights fetched meanwhile
#pragma unroll
    for (int d = 0; d < DEPTH; d++) request(d, false);

    for (int r = 0; r < (KIND == BOOK ? BESIDE * RT : 1); r++)  // while the first weights are on their way
        prepare(shared + r * table_bytes, min(block_tile + r, tiles - 1));
    if (tables) __syncthreads();
    if (OUTLIERS && team >= WARPS) {
        for (int r = 2 * (warp - WARPS * BESIDE); r < PART; r += 2 * HELPERS) {  // two rows a warp
            const int own_row = r + lane / 16, row = min(block_tile * TILE + (int)blockIdx.z * PART + own_row, rows - 1);
            correct(outlier_rows[row], outlier_rows[row + 1], outlier_columns, outlier_values, turned + first_token,
                    gridDim.y * TOKENS, corrections + own_row * TOKENS, lane % 16);
        }
    }

    float sums[RT][NT][4] = {};
    u32 at[NT];  // where a lane finds its row of a matrix of inputs; tokens past the last read it again, for nothing
#pragma unroll
    for (int n = 0; n < NT; n++) at[n] = own + min(n * 8 + lane % 8, count - 1) * PITCH_X + lane / 8 * 16;
    const u8* own_tables = KIND == BOOK ? shared + warp % BESIDE * RT * table_bytes : shared;
    for (int chunk = first; chunk < last;) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++, chunk += STRIDE) {
            if (chunk >= last) break;
            copies_wait<DEPTH - 1>();
            meet(team);
            float part[RT][NT][4] = {};                 // of a group, with AFTER: x (code - middle)
            float total[SPARSE ? RT : 1][NT][4] = {};  // and x; where weights are pruned, of those that meet one
            u32 b[NT][4];                               // inputs of two steps; with SPARSE of one
#pragma unroll
            for (int r = 0; r < RT; r++) held[d][r].weights.settle();
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                constexpr u32 one = (T::BIAS << T::MANTISSA) * 0x10001u;
                const u32 ones[4] = {one, one, one, one};
                if (SPARSE || s % 2 == 0) {
#pragma unroll
                    for (int n = 0; n < NT; n++) load_matrices(b[n], at[n] + d * slot + s * (SPARSE ? 64 : 32));
                }
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const u8* own_table = KIND == BOOK ? own_tables + r * table_bytes : own_tables;
                    const Weights<T>& weights = held[d][r].weights;
                    u32 a[4];
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        a[e] = AFTER ? weights.pair(own_table, 4 * s + e) : weights.weight(own_table, 4 * s + e);
#pragma unroll
                    for (int n = 0; n < NT; n++) held[d][r].multiply(AFTER ? part[r][n] : sums[r][n], a, b[n], s);
                    if (AFTER && Weights<T>::HAS_OFFSET && (SPARSE || r == 0)) {
#pragma unroll
                        for (int n = 0; n < NT; n++) held[d][r].multiply(total[SPARSE ? r : 0][n], ones, b[n], s);
                    }
                }
                if (AFTER && (s + 1) % Weights<T>::GROUP_STEPS == 0) {
#pragma unroll
                    for (int r = 0; r < RT; r++)
                        finish_group(sums[r], part[r], total[SPARSE ? r : 0], held[d][r].weights,
                                     s / Weights<T>::GROUP_STEPS);
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) total[0][n][e] = 0;
                }
            }
            request(d, true);
        }
    }
    copies_wait<0>();
    __syncthreads();  // the inputs' place is free
    float* together = (float*)inputs;                           // of the block, [token][row]
    float* all = together + (SPLIT > 1 ? TOKENS * ROWS : 0);  // of the teams, [team][row][PITCH_SUM]
#pragma unroll
    for (int r = 0; team < WARPS && r < RT; r++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                all[(team * ROWS + (warp % BESIDE * RT + r) * TILE + lane / 4 + e / 2 * 8) * PITCH_SUM + n * 8 +
                    lane % 4 * 2 + e % 2] = sums[r][n][e];
    __syncthreads();
    auto write = [&](int r, int m, float sum) {
        const int row = block_tile * TILE + r;
        if (OUTLIERS) sum += corrections[(r - blockIdx.z * PART) * TOKENS + m];
        if (row < rows) out[(u64)(first_token + m) * rows + row] = (u16)T::pack(sum, 0.0f);
    };
    for (int i = threadIdx.x; i < ROWS * count; i += THREADS) {
        const int r = i % ROWS, m = i / ROWS;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += all[(w * ROWS + r) * PITCH_SUM + m];
        if (SPLIT > 1) {
            together[i] = sum;
        } else {
            write(r, m, sum);
        }
    }
#if SPLIT > 1
    cluster_sync();
    for (int i = threadIdx.x; i < PART / 4 * count; i += THREADS) {
        const int r = blockIdx.z * PART + i % (PART / 4) * 4, m = i / (PART / 4);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < SPLIT; k++) {
            const float4 v = read_cluster(together + m * ROWS + r, k);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        write(r, m, sum.x), write(r + 1, m, sum.y), write(r + 2, m, sum.z), write(r + 3, m, sum.w);
    }
    cluster_sync();  // nobody leaves while another reads its sums
#endif
}

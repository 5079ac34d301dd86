// out[rows] = W x for one token: as fast as the packed weights can be read.
//
// A block owns RT tiles of 16 rows; its warps share out the columns by chunks of 128 and add their sums up at the end,
// always in the same order. Every warp keeps DEPTH chunks on their way, in registers.
//
// The tensor cores multiply weights by eight columns of inputs, and one token fills one. So each of the eight steps of a
// chunk has a column of its own, with zeros in the others: what comes out of all steps together is, column by column,
// the sum over one step's inputs. Scales and offsets are applied to these once a chunk, each by the lane that has it,
// and a lane needs of all inputs only those of the step whose column it holds: two words.
//
// Single weights that are corrected from a list, in compressed sparse rows, are the work of four more warps meanwhile.
//
// Macros: KIND and what it asks for (weights.cuh); T: Half or BFloat, the type of x and out; RT, WARPS, DEPTH; OUTLIERS:
// 1 where there is such a list.
#include "weights.cuh"

#ifndef OUTLIERS
#define OUTLIERS 0
#endif

constexpr int ROWS = RT * TILE;
constexpr int CODE_BYTES = Words<BITS>::BYTES;
constexpr int HELPERS = OUTLIERS ? 4 : 0, THREADS = (WARPS + HELPERS) * 32;
typedef Weights<T, true> Held;

// The correction of one row, by 16 lanes, each of which gets it.
DEVICE float correction(u32 begin, u32 end, const u16* columns, const u16* values, const u16* x, int lane) {
    float sum = 0;
#pragma unroll 4
    for (u32 i = begin + lane; i < end; i += 16) sum = fmaf(T::low(values[i]), T::low(x[columns[i]]), sum);
#pragma unroll
    for (int step = 8; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    single(const u8* codes, const u8* scales, const u8* offsets, const u8* table, const u32* outlier_rows,
           const u16* outlier_columns, const u16* outlier_values, const u16* x, u16* out, int rows, int columns, int chunks,
           int shift) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it to be the warp's
    const int tiles = (rows + TILE - 1) / TILE, first_tile = blockIdx.x * RT;
    const Layer layer = {codes, scales, offsets, table, chunks, shift};

    // shared memory: tables, corrections, sums
    constexpr int table_bytes = Held::SHARED_PAIRS, tables = KIND == BOOK ? table_bytes * RT : table_bytes;
    float* corrections = (float*)(shared + tables);
    float* all = corrections + (OUTLIERS ? ROWS : 0);  // [warp][row]

    // The warp takes chunks warp, warp + WARPS, ...; these point at the next one to be asked for.
    int next = warp;
    const u8* next_codes[RT];
#pragma unroll
    for (int r = 0; r < RT; r++)
        next_codes[r] = layer.row(min(first_tile + r, tiles - 1), CODE_BYTES) + warp * (BAND * CODE_BYTES) +
                        Words<BITS>::place(lane);
    int next_column = warp * CHUNK + lane / 4 * 16 + lane % 4 * 2;

    Held held[DEPTH][RT];
    u32 inputs[DEPTH][2];
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
                held[d][r].statistics(typename Held::Place(layer, min(first_tile + r, tiles - 1), lane), layer.index(next));
#pragma unroll
            for (int i = 0; i < 2; i++)
                inputs[d][i] = next_column + 8 * i < columns ? *(const u32*)(x + next_column + 8 * i) : 0;
        }
        next += WARPS;
        next_column += WARPS * CHUNK;
    };
#pragma unroll
    for (int i = 0; i < DEPTH * RT; i++)
        if (next + i / RT * WARPS < last) {
            const u8* chunk = next_codes[i % RT] - Words<BITS>::place(lane);
            prefetch_chunk<CODE_BYTES>(chunk + i / RT * WARPS * BAND * CODE_BYTES, lane);
        }
    wait_for_previous();
    next_may_begin();  // where there is room: it has its first weights fetched meanwhile
#pragma unroll
    for (int d = 0; d < DEPTH; d++) request(d);

    for (int r = 0; r < (KIND == BOOK ? RT : 1); r++)  // while the first weights are on their way
        Held::prepare_pairs(shared + r * table_bytes, layer, min(first_tile + r, tiles - 1), THREADS);
    if (tables) __syncthreads();
    if (OUTLIERS && warp >= WARPS) {
        for (int r = 2 * (warp - WARPS); r < ROWS; r += 2 * HELPERS) {  // two rows a warp
            const int own_row = r + lane / 16, row = min(first_tile * TILE + own_row, rows - 1);
            const float sum = correction(outlier_rows[row], outlier_rows[row + 1], outlier_columns, outlier_values, x,
                                         lane % 16);
            if (lane % 16 == 0) corrections[own_row] = sum;
        }
    }

    float sums[RT][2] = {};  // rows g and g + 8 of a tile, over the steps whose columns the lane has
    for (int chunk = warp; chunk < last;) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++, chunk += WARPS) {
            if (chunk >= last) break;
            float part[RT][4] = {}, total[4] = {};  // of a step in each column: x (code - middle), and x
#pragma unroll
            for (int r = 0; r < RT; r++) held[d][r].settle();
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const u32 b[2] = {lane / 4 == s ? inputs[d][0] : 0, lane / 4 == s ? inputs[d][1] : 0};
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const u8* own_table = KIND == BOOK ? shared + r * table_bytes : shared;
                    u32 a[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) a[e] = held[d][r].pair(own_table, 4 * s + e);
                    T::mma(part[r], a, b[0], b[1]);
                }
                if (Held::HAS_OFFSET) {
                    constexpr u32 one = (T::BIAS << T::MANTISSA) * 0x10001u;
                    const u32 ones[4] = {one, one, one, one};
                    T::mma(total, ones, b[0], b[1]);
                }
            }
#pragma unroll
            for (int r = 0; r < RT; r++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float scale, offset = 0;
                    held[d][r].group(e % 2, e / 2, scale, offset);
                    sums[r][e / 2] = fmaf(scale, part[r][e], sums[r][e / 2]);
                    if (Held::HAS_OFFSET) sums[r][e / 2] = fmaf(offset, total[e % 2], sums[r][e / 2]);
                }
            request(d);
        }
    }
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = sums[r][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (warp < WARPS && lane % 4 == 0) all[warp * ROWS + r * TILE + half * 8 + lane / 4] = sum;
        }
    __syncthreads();
    for (int r = threadIdx.x; r < ROWS; r += THREADS) {
        const int row = first_tile * TILE + r;
        if (row < rows) {
            float sum = OUTLIERS ? corrections[r] : 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += all[w * ROWS + r];
            out[row] = (u16)T::pack(sum, 0.0f);
        }
    }
}

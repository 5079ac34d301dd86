// A block of up to 128 columns of the loops that go column by column: GPTQ's sweep, which may prune as it goes
// (SparseGPT, Algorithm 1) and leave outliers be (SpQR), and coordinate descent (DESCEND). All matrices are [column][row],
// row: of the weight matrix. What the block does to later columns is a matrix product with its errors, made elsewhere.
//
// A column is decided, and the columns behind it in the block move by its error times a row of `factor`. A warp has four
// rows. Eight lanes share one, each with four neighbouring columns of every 32: the lane that has the column's turn
// decides it for its row (the other seven do the same for columns of theirs, for nothing), tells the error to the others,
// and all move what they hold. Four rows at once, so that one decision's many steps are paid for four.
//
// Macros: T: Half, BFloat or Single, to which weights are rounded; LEVELS: 0 weights stay what they are, 1 levels `low`
// to `high` on a grid, less its zero point where ZERO, 2 codes 0 to `high` of grids with any zero point, and outliers;
// ALIVE: a mask of weights that may differ from 0, with LEVELS 2 of the outliers; CHOOSE: of every `run` columns, 32 at most,
// `drop` are pruned, by their score when the loop reaches them.
#include "rounding.cuh"

#ifndef DESCEND
#define DESCEND 0
#endif
#ifndef ZERO
#define ZERO 0
#endif
#ifndef ALIVE
#define ALIVE 0
#endif
#ifndef CHOOSE
#define CHOOSE 0
#endif

constexpr int COLUMNS = 128, ROWS = 32, PITCH = ROWS + 1, THREADS = 256;
constexpr int SHARERS = 8, OWN = COLUMNS / SHARERS;  // lanes of a row; columns of a lane

// Where column OWN value `m` of a lane is in the block.
DEVICE int column_of(int m, int sharer) { return m / 4 * 32 + sharer * 4 + m % 4; }

// a / b, rounded once, from b's inverse rounded once (Markstein 1990, "Computation of Elementary Functions on the IBM RISC
// System/6000 Processor", section 5): two steps in place of a division's dozen.
DEVICE float quotient(float a, float b, float inverse) {
    const float near = __fmul_rn(a, inverse);
    return fmaf(fmaf(-near, b, a), inverse, near);
}
// x rounded to a whole number, half to even, from low to high, whole numbers below 2^22.
DEVICE float nearest(float x, float low, float high) {
    return __fadd_rn(__fadd_rn(fminf(fmaxf(x, low), high), 12582912.0f), -12582912.0f);  // 1.5 * 2^23
}

extern "C" __global__ void __launch_bounds__(THREADS)
    columns(const float* w, const float* factor, const float* diagonal, const float* scale, const float* zero,
            const u8* alive, const float* now, float* k, float* error, float* value, u8* kept, int rows, int count,
            int stride, float low, float high, int run, int drop) {
    extern __shared__ __align__(16) u8 shared[];
    float* moves = (float*)shared;              // [COLUMNS][COLUMNS]: factor above its diagonal, 0 elsewhere
    float* first = moves + COLUMNS * COLUMNS;   // [COLUMNS][PITCH]: a matrix on its way in; levels on their way out
    float* second = first + COLUMNS * PITCH;    // scores; errors
    float* third = second + COLUMNS * PITCH;    // with LEVELS 2 and nothing else: values
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sharer = lane % SHARERS;
    const int first_row = blockIdx.x * ROWS, own_row = warp * (32 / SHARERS) + lane / SHARERS;
    const int there = rows - first_row;  // rows, if less than ROWS

    const bool fours = stride % 4 == 0 && (u64)factor % 16 == 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < COLUMNS * COLUMNS / 4; i += THREADS) {
        const int r = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4;
        const float* from = factor + (u64)r * stride + c;
        float4 v = make_float4(0, 0, 0, 0);
        if (fours && r < c + 3 && c + 4 <= count) {
            v = *(const float4*)from;
        } else if (r < count) {
            v.x = c < count ? from[0] : 0, v.y = c + 1 < count ? from[1] : 0;
            v.z = c + 2 < count ? from[2] : 0, v.w = c + 3 < count ? from[3] : 0;
        }
        *(float4*)(moves + 4 * i) = make_float4(r < c ? v.x : 0, r < c + 1 ? v.y : 0, r < c + 2 ? v.z : 0, r < c + 3 ? v.w : 0);
    }
    // Each lane's part of a matrix or of two, by way of shared memory; `otherwise` outside of it.
    constexpr int LOADS = COLUMNS / (THREADS / 32);
    auto ask = [&](const float* from, float* part, float otherwise) {
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const int c = warp + j * (THREADS / 32);
            part[j] = c < count && lane < there ? from[(u64)c * rows + first_row + lane] : otherwise;
        }
    };
    auto put = [&](const float* part, float* to) {
#pragma unroll
        for (int j = 0; j < LOADS; j++) to[(warp + j * (THREADS / 32)) * PITCH + lane] = part[j];
    };
    auto take = [&](const float* from, float* own) {
#pragma unroll
        for (int m = 0; m < OWN; m++) own[m] = from[column_of(m, sharer) * PITCH + own_row];
    };
    auto read = [&](const float* one, float* own, float otherwise, const float* other = nullptr, float* others = nullptr) {
        float part[2][LOADS];
        ask(one, part[0], otherwise);
        if (other) ask(other, part[1], 1.0f);
        __syncthreads();
        put(part[0], first);
        if (other) put(part[1], second);
        __syncthreads();
        take(first, own);
        if (other) take(second, others);
    };
    // inverse: 1 / s to the last place, with which a quotient comes out as by division (see `quotient`)
    float v[OWN], s[OWN], z[OWN], base[OWN], weigh[OWN], inverse[OWN];
    if (LEVELS > 0) {
        read(w, v, 0.0f, scale, s);
#pragma unroll
        for (int m = 0; m < OWN; m++) inverse[m] = __frcp_rn(s[m]);
    } else {
        read(w, v, 0.0f);
    }
    if (ZERO) read(zero, z, 0.0f);
    if (DESCEND) read(now, base, 0.0f);
    u32 live = ~0u;  // bit m: own weight m may differ from 0 (LEVELS 2: is an outlier)
    if (ALIVE) {
        live = 0;
#pragma unroll
        for (int m = 0; m < OWN; m++) {
            const int c = column_of(m, sharer);
            if (c < count && own_row < there && alive[(u64)c * rows + first_row + own_row]) live |= 1u << m;
        }
    }
    u32 chosen = ~0u;  // bit m: own weight m is kept by its run's choice
#pragma unroll
    for (int m = 0; m < OWN; m++) {
        const int c = column_of(m, sharer);
        weigh[m] = c < count ? diagonal[c] : 1.0f;
    }
    __syncthreads();

#pragma unroll
    for (int g = 0; g < COLUMNS / 32; g++)
#pragma unroll 1
        for (int owner = 0; owner < SHARERS; owner++) {
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const int i = g * 32 + owner * 4 + t, m = g * 4 + t;
                if (i >= count) break;
                if (CHOOSE && i % run == 0) {
                    const int end = min(i + run, count);  // no more than 32 columns on: in this 32 or the next
#pragma unroll
                    for (int o = 0; o < OWN; o++) {
                        const int c = column_of(o, sharer);
                        if (o / 4 >= g && o / 4 <= g + 1 && c >= i && c < end)
                            second[c * PITCH + own_row] = live >> o & 1 ? fabsf(v[o]) * weigh[o] : -1.0f;
                    }
                    __syncwarp();
#pragma unroll
                    for (int o = 0; o < OWN; o++) {
                        const int c = column_of(o, sharer);
                        if (o / 4 >= g && o / 4 <= g + 1 && c >= i && c < end) {
                            const float mine = second[c * PITCH + own_row];
                            int lower = 0;
                            for (int other = i; other < end; other++) {
                                const float score = second[other * PITCH + own_row];
                                lower += score < mine || (score == mine && other < c);
                            }
                            if (lower < drop) chosen &= ~(1u << o);
                        }
                    }
                    __syncwarp();
                }
                const float before = DESCEND ? base[m] : v[m];
                const float wish = DESCEND ? __fadd_rn(__fmul_rn(v[m], weigh[m]), base[m]) : v[m];
                const bool on = (live & chosen) >> m & 1;
                float level, becomes;
                if (LEVELS == 0) {
                    level = becomes = on ? Rounded<T>::round(wish) : 0.0f;
                } else if (LEVELS == 1) {
                    const float lowest = ZERO ? -z[m] : low, highest = ZERO ? high - z[m] : high;
                    level = on ? nearest(quotient(wish, s[m], inverse[m]), lowest, highest) : 0.0f;
                    becomes = Rounded<T>::round(__fmul_rn(level, s[m]));
                } else {
                    level = nearest(__fadd_rn(quotient(wish, s[m], inverse[m]), z[m]), 0.0f, high);
                    becomes = Rounded<T>::round(on ? wish : __fmul_rn(level - z[m], s[m]));
                }
                const float off = DESCEND ? becomes - before : (before - becomes) * weigh[m];
                if (sharer == owner) {
                    first[i * PITCH + own_row] = level;
                    second[i * PITCH + own_row] = off;
                    if (LEVELS == 2) third[i * PITCH + own_row] = becomes;
                }
                const float told = __shfl_sync(~0u, off, owner, SHARERS);
#pragma unroll
                for (int o = g; o < OWN / 4; o++) {
                    const float4 by = *(const float4*)(moves + i * COLUMNS + o * 32 + sharer * 4);
                    v[4 * o] = fmaf(-told, by.x, v[4 * o]), v[4 * o + 1] = fmaf(-told, by.y, v[4 * o + 1]);
                    v[4 * o + 2] = fmaf(-told, by.z, v[4 * o + 2]), v[4 * o + 3] = fmaf(-told, by.w, v[4 * o + 3]);
                }
            }
        }

    if (CHOOSE) {
#pragma unroll
        for (int m = 0; m < OWN; m++) {
            const int c = column_of(m, sharer);
            if (c < count && own_row < there) kept[(u64)c * rows + first_row + own_row] = chosen >> m & 1;
        }
    }
    __syncthreads();
    if (lane < there) {
#pragma unroll 4
        for (int c = warp; c < count; c += THREADS / 32) {
            const u64 at = (u64)c * rows + first_row + lane;
            k[at] = first[c * PITCH + lane];
            error[at] = second[c * PITCH + lane];
            if (LEVELS == 2) value[at] = third[c * PITCH + lane];
        }
    }
}

// The search of a grid's scales that compress/grid.py defines: of each group's candidates, in their order, the first whose
// squared error is the least.
//
// TEAM lanes of a warp share a group, each with HELD of its weights in registers, so that weights are read once. BATCH
// candidates at a time: each lane works out the scale and the zero point of one, the team measures one after the other,
// and each lane is given the total of its own. A group with too many weights for that (LONG) is a warp's, piece by piece,
// and read again, from the caches, for each batch.
//
// A weight's level is found without a division: its place in the grid, from 0 (lowest level) to 1, clamps for nothing.
// Where grid.py finds another level, the weight lies in the middle between the two but for the rounding of float32, and
// its error is the same. Scales and zero points themselves are divided for.
//
// Macros: T: Half, BFloat or Single, in which scales are stored; BITS; SYMMETRIC, WEIGHTED (by importance), LONG: 0 or 1;
// TEAM: 4, 8, 16 or 32; HELD; LOWEST_ZERO: of grid.py.
#include "rounding.cuh"

constexpr int THREADS = 128, BATCH = TEAM < 8 ? TEAM : 8;
constexpr float TOP = (1 << BITS) - 1, HALF = 1 << (BITS - 1);
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, half to even

// These hand NaN on, as torch does.
DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }
DEVICE float within(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// As grid.round_scale: in the stored type, no nearer to 0 than `least`.
DEVICE float stored(float x, float least, float most) {
    const float rounded = Rounded<T>::round(x);
    return fabsf(rounded) < least ? (rounded < 0 ? -least : least) : within(rounded, -most, most);
}

// The sums over a team of BATCH values a lane; a lane is given that of value lane % BATCH.
DEVICE float total(float* values, int lane) {
#pragma unroll
    for (int step = BATCH / 2; step; step >>= 1)
#pragma unroll
        for (int i = 0; i < step; i++) {
            const bool upper = lane & step;
            const float other = __shfl_xor_sync(~0u, upper ? values[i] : values[i + step], step);
            values[i] = (upper ? values[i + step] : values[i]) + other;
        }
#pragma unroll
    for (int step = BATCH; step < TEAM; step <<= 1) values[0] += __shfl_xor_sync(~0u, values[0], step);
    return values[0];
}

// candidates: a factor of the plain scale and what is added to the zero point. The first is where the search starts, then
// come `coarse` others and `fine` whose factors are steps from the best of those.
extern "C" __global__ void __launch_bounds__(THREADS)
    search(const float* weight, const float* importance, const float2* candidates, float* scales, float* zeros, int rows,
           int columns, int size, int coarse, int fine, float least, float most) {
    const int lane = threadIdx.x % TEAM, groups = (columns + size - 1) / size;
    const int team = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
    const int group = min(team, rows * groups - 1);  // a team too many does the last one's work again, for nothing
    const int first = group % groups * size, count = min(size, columns - first);
    weight += (u64)(group / groups) * columns + first;

    float w[HELD], cost[HELD];
    auto load = [&](int begin) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = begin + i * TEAM + lane;
            w[i] = at < count ? weight[at] : 0;  // a weight of 0 has no error, whatever the grid
            if (WEIGHTED) cost[i] = at < count ? importance[first + at] : 0;
        }
    };
    const int end = LONG ? count : 1;  // of the columns at which pieces begin

    float over = 0, under = 0;  // how far the weights reach to either side of 0
    for (int begin = 0; begin < end; begin += TEAM * HELD) {
        load(begin);
#pragma unroll
        for (int i = 0; i < HELD; i++) over = larger(w[i], over), under = larger(-w[i], under);
    }
#pragma unroll
    for (int step = 1; step < TEAM; step <<= 1) {
        over = larger(over, __shfl_xor_sync(~0u, over, step));
        under = larger(under, __shfl_xor_sync(~0u, under, step));
    }
    float span;
    if (SYMMETRIC) {
        span = larger(larger(over, under), 1e-10f) / (HALF - 0.5f);
    } else {
        if (over + under < 1e-10f) over = 1e-10f;
        under = larger(under, over / (2 * TOP - 1));
        span = over + under;
    }

    // Of a candidate; `now`: the factor that fine steps start from.
    auto factor_of = [&](int number, float now) {
        const float f = candidates[number].x;
        return number <= coarse ? f : now + (now < 0 ? -f : f);
    };
    auto scale_of = [&](float f) { return stored(SYMMETRIC ? span * f : span * f / TOP, least, most); };
    auto zero_of = [&](int number, float f, float scale) {
        if (SYMMETRIC) return HALF;
        const float zero = within(rintf(under * f / scale), LOWEST_ZERO, TOP);
        return within(zero + candidates[number].y, LOWEST_ZERO, TOP);
    };

    // An error and whose it is, in one number: the smaller is better, and of equals the earlier. NaN is never better.
    u64 best = (u64)0x7f800000 << 32;
    float factor = 1;
#pragma unroll 1
    for (int stage = 0; stage < 2; stage++) {
        const int last = stage ? coarse + fine : coarse;
#pragma unroll 1
        for (int from = stage ? coarse + 1 : 1; from <= last; from += BATCH) {
            const int number = from + lane % BATCH, known = min(number, last);
            const float f = factor_of(known, factor), own_scale = scale_of(f);
            const float own_zero = zero_of(known, f, own_scale), own_inverse = 1 / (own_scale * TOP);
            float errors[BATCH] = {};
            for (int begin = 0; begin < end; begin += TEAM * HELD) {
                if (LONG) load(begin);
#pragma unroll
                for (int c = 0; c < BATCH; c++) {
                    if (from + c > last) continue;
                    const float scale = __shfl_sync(~0u, own_scale, c, BATCH);
                    const float inverse = __shfl_sync(~0u, own_inverse, c, BATCH);
                    const float zero = SYMMETRIC ? HALF : __shfl_sync(~0u, own_zero, c, BATCH);
#pragma unroll
                    for (int i = 0; i < HELD; i++) {
                        const float place = fma_saturated(w[i], inverse, zero * (1 / TOP));
                        const float k = fmaf(place, TOP, MAGIC - zero) - MAGIC;
                        const float error = fmaf(k, scale, -w[i]);
                        errors[c] = WEIGHTED ? fmaf(error * error, cost[i], errors[c]) : fmaf(error, error, errors[c]);
                    }
                }
            }
            const u64 mine = (u64)__float_as_uint(total(errors, lane)) << 32 | number;
            if (number <= last) best = min(best, mine);
        }
#pragma unroll
        for (int step = 1; step < BATCH; step <<= 1) best = min(best, __shfl_xor_sync(~0u, best, step));
        factor = factor_of((int)(u32)best, factor);
    }
    if (lane == 0 && team == group) {
        const float scale = scale_of(factor);
        scales[group] = scale;
        zeros[group] = zero_of((int)(u32)best, factor, scale);
    }
}

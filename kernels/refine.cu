// A step of refining a uniform grid, which compress/refiners/tuned.py defines: places move against the gradient of their
// weights, scales and zero points against theirs, and the weights are written as they then are.
//
// TEAM lanes of a warp share a group, RUN neighbouring weights each. All that a step reads is read once, and stays in
// registers until the group's sums are known; a group with too many weights for that (LONG) is a warp's, piece by piece,
// and read again from the caches.
//
// Macros: T: Half, BFloat or Single, of gradients and of what is written; S: likewise, of stored scales; BITS; ZERO: zero
// points move, too; ALIVE: weights that are pruned stay 0; TEAM: 2, 4, 8, 16 or 32; LONG: 0 or 1. Of tuned.py: CELL, LEAST,
// MOST, FAR; of grid.py: LOWEST_ZERO.
#include "rounding.cuh"

constexpr int THREADS = 128, RUN = 8;
constexpr float TOP = (1 << BITS) - 1;

// RUN numbers at p + at, from and to float32.
template <class F>
struct Stored {
    DEVICE void read(const void* p, u64 at, float* x) {
        const uint4 v = *(const uint4*)((const u16*)p + at);
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) x[2 * i] = F::low(pairs[i]), x[2 * i + 1] = F::high(pairs[i]);
    }
    DEVICE void write(void* p, u64 at, const float* x) {
        *(uint4*)((u16*)p + at) = make_uint4(F::pack(x[0], x[1]), F::pack(x[2], x[3]), F::pack(x[4], x[5]), F::pack(x[6], x[7]));
    }
};
template <>
struct Stored<Single> {
    DEVICE void read(const void* p, u64 at, float* x) {
        const float4 a = ((const float4*)((const float*)p + at))[0], b = ((const float4*)((const float*)p + at))[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
    DEVICE void write(void* p, u64 at, const float* x) {
        ((float4*)((float*)p + at))[0] = make_float4(x[0], x[1], x[2], x[3]);
        ((float4*)((float*)p + at))[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
};

DEVICE float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
DEVICE float within(float x, float low, float high) { return fmaxf(fminf(x, high), low); }

// pace: see tuned.paces. alive: a byte a weight, 0 or 1. `groups` of `size` weights, which follow each other in memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    refine(const void* gradient, float* place, float* squares, const float* first, float* factor, float* zero,
           const u8* alive, void* weight, const float* pace, int groups, int size) {
    const int lane = threadIdx.x % TEAM, group = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
    const int count = group < groups ? size : 0;  // a team too many has nothing to do, but for the others' shuffles
    const u64 begin = (u64)group * size;
    const float rate = pace[0], scale_rate = pace[1], each = pace[2];
    const float start = count ? first[group] : 1, offset = count ? zero[group] : 0, nearest = rintf(offset);

    float slope[RUN], at[RUN], usual[RUN];
    auto load = [&](int from) {
        Stored<T>::read(gradient, begin + from, slope);
        Stored<Single>::read(place, begin + from, at);
    };

    float towards = 0, ends = 0;  // slopes of the scale and of the zero point
    for (int from = lane * RUN; from < count; from += TEAM * RUN) {
        load(from);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const float level = within(rintf(at[i]), -nearest, TOP - nearest);
            towards = fmaf(slope[i], level, towards);
            if (ZERO && (level <= -nearest || level >= TOP - nearest)) ends += slope[i];
        }
    }
#pragma unroll
    for (int step = 1; step < TEAM; step <<= 1) {
        towards += __shfl_xor_sync(~0u, towards, step);
        if (ZERO) ends += __shfl_xor_sync(~0u, ends, step);
    }
    const float side = sign(start);
    const float grown = within((count ? factor[group] : 1) - scale_rate * sign(towards * start), LEAST, MOST);
    const float scale = Rounded<S>::round(start * grown);
    const float moved = ZERO ? within(offset + rate * sign(ends * side), LOWEST_ZERO, TOP) : offset, whole = rintf(moved);

    for (int from = lane * RUN; from < count; from += TEAM * RUN) {
        if (LONG) load(from);
        Stored<Single>::read(squares, begin + from, usual);
        float out[RUN];
        const uint2 there = ALIVE ? *(const uint2*)(alive + begin + from) : make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            usual[i] = fmaf(slope[i], slope[i], usual[i]);
            const float share = within(slope[i] / fmaxf(sqrtf(usual[i] * each), 1e-30f), -FAR, FAR);
            at[i] = within(at[i] - rate * (share * side), -moved - CELL, TOP - moved + CELL);
            if (ALIVE && !((i < 4 ? there.x : there.y) >> 8 * (i % 4) & 1)) at[i] = 0;
            out[i] = Rounded<S>::round(within(rintf(at[i]), -whole, TOP - whole) * scale);
        }
        Stored<Single>::write(place, begin + from, at);
        Stored<Single>::write(squares, begin + from, usual);
        Stored<T>::write(weight, begin + from, out);
    }
    __syncwarp();  // all have read what is written now
    if (lane == 0 && count) {
        factor[group] = grown;
        if (ZERO) zero[group] = moved;
    }
}

// 8-bit codes of inputs, a scale for each token, and the inputs of outlier columns as they are: what narrow8.cu and
// wide8.cu multiply. A block reads its token once and keeps it in registers.
//
//     scale = max |x| / 127 over all but the outlier columns, or 1; code = x / scale, rounded half to even
//
// The quotient is a product with 1 / scale and one correction. Tried on a CPU for every pair of a maximum and an input,
// it rounds to the same whole number as a division does: for all float16, and for bfloat16 with maxima above 1e-30.
// A token that holds an infinity or NaN has codes of 0 and a scale that is neither, so that its products are NaN.
//
// Macros: T: Half or BFloat; VECTORS: of 8 inputs, that a thread holds; OUTLIERS: 1 if there are such columns.
#include "codes8.cuh"

// Of 8 inputs, two to a word, those in `marks` (a bit each) become zeros.
DEVICE void clear(u32* words, u32 marks) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 two = marks >> (2 * i);
        words[i] &= ~((two & 1 ? 0xffffu : 0) | (two & 2 ? 0xffff0000u : 0));
    }
}

// In the low byte: the code of an input. Adding 1.5 * 2^23 rounds to a whole number, half to even.
DEVICE u32 code(float x, float scale, float inverse) {
    const float q = x * inverse;
    return __float_as_uint(fmaf(fmaf(-q, scale, x), inverse, q) + 12582912.0f);
}

extern "C" __global__ void __launch_bounds__(1024)
    quantise(const u16* x, const int* outliers, u8* to, float* scales, int columns, int chunks, int outlier_count,
             int outlier_chunks) {
    extern __shared__ __align__(128) u8 shared[];  // a bit a column: an outlier
    __shared__ u32 tops[32];
    const int lane = threadIdx.x % 32, threads = blockDim.x, vectors = chunks * (CHUNK / 8);
    x += (u64)blockIdx.x * columns;
    to += (u64)blockIdx.x * (chunks + outlier_chunks) * INPUT_BYTES;
    u32 held[VECTORS][4];
    wait_for_previous();
    next_may_begin();  // a product that fetches its weights meanwhile
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int at = (threadIdx.x + v * threads) * 8;
        const uint4 eight = at < columns ? stream16<0>(x + at) : make_uint4(0, 0, 0, 0);
        held[v][0] = eight.x, held[v][1] = eight.y, held[v][2] = eight.z, held[v][3] = eight.w;
    }

    u16 kept = 0;  // a thread's first outlier input; it is needed at the end
    if (OUTLIERS) {
        for (int i = threadIdx.x; i < vectors / 4; i += threads) ((u32*)shared)[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < outlier_count; i += threads) {
            const u32 column = outliers[i];
            if (i < threads) kept = x[column];
            atomicAdd((u32*)shared + column / 32, 1u << (column % 32));  // no column comes twice
        }
        __syncthreads();
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int i = threadIdx.x + v * threads;
            const u32 of = i < vectors ? shared[i] : 0;
            if (of) clear(held[v], of);
        }
    }

    // The bits of 16-bit floats without their signs are in the order of the numbers, NaN above all.
    u32 high = 0, low = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            high = max(high, held[v][i] & 0x7fffffffu);
            low = max(low, held[v][i] & 0x7fffu);
        }
    }
    const u32 mine = largest(max(high >> 16, low));
    if (lane == 0) tops[threadIdx.x / 32] = mine;
    __syncthreads();
    const u32 top = largest(lane < threads / 32 ? tops[lane] : 0);

    float scale = T::low(top) / 127.0f;
    if (scale == 0) scale = 1;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    const float inverse = 1.0f / scale;
    constexpr u32 infinity = 0x7fffu >> T::MANTISSA << T::MANTISSA;
    const u32 finite = top < infinity ? ~0u : 0;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int i = threadIdx.x + v * threads;
        u32 codes[8];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            codes[2 * e] = code(T::low(held[v][e]), scale, inverse);
            codes[2 * e + 1] = code(T::high(held[v][e]), scale, inverse);
        }
        if (i < vectors)
            ((uint2*)to)[i] = make_uint2(low_bytes(codes[0], codes[1], codes[2], codes[3]) & finite,
                                         low_bytes(codes[4], codes[5], codes[6], codes[7]) & finite);
    }
    if (OUTLIERS) {
        u16* own = (u16*)(to + chunks * INPUT_BYTES);
        for (int i = threadIdx.x; i < outlier_chunks * OUTLIER_CHUNK; i += threads)
            own[i] = i < threads ? kept : i < outlier_count ? x[outliers[i]] : 0;
    }
}

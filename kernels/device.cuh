// The few machine instructions that the kernels use, each behind a name. No other file holds inline assembly, and none
// includes a CUDA header: NVRTC needs nothing but this folder, and the tests swap this file for one that runs on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__

// --- 16-bit floats, two to a register ------------------------------------------------------------------------------

// The bits of a small whole number n > 0 in a 16-bit float with MANTISSA stored bits and exponent bias BIAS.
template <int MANTISSA, int BIAS>
__host__ __device__ constexpr u32 whole(u32 n) {
    u32 e = 0;
    while ((n >> (e + 1)) != 0) e++;
    return ((BIAS + e) << MANTISSA) | ((n << (MANTISSA - e)) & ((1u << MANTISSA) - 1));
}

// float16. `fma` and `mul` round once, as the instructions do.
struct Half {
    static constexpr int MANTISSA = 10, BIAS = 15;
    DEVICE u32 fma(u32 a, u32 b, u32 c) {
        u32 d;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
    DEVICE float low(u32 a) {
        float f;
        asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(a));
        return f;
    }
    DEVICE float high(u32 a) {
        float f;
        asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(a));
        return f;
    }
    DEVICE u32 pack(float l, float h) {
        u32 d;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(h), "f"(l));
        return d;
    }
    // D[16 x 8] += A[16 x 16] B[16 x 8], by the 32 lanes of a warp
    DEVICE void mma(float* d, const u32* a, u32 b0, u32 b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// bfloat16. A product alone is fma with -0, since sm_80 has no other.
struct BFloat {
    static constexpr int MANTISSA = 7, BIAS = 127;
    DEVICE u32 fma(u32 a, u32 b, u32 c) {
        u32 d;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
    DEVICE float low(u32 a) { return __uint_as_float(a << 16); }
    DEVICE float high(u32 a) { return __uint_as_float(a & 0xffff0000u); }
    DEVICE u32 pack(float l, float h) {
        u32 d;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(h), "f"(l));
        return d;
    }
    DEVICE void mma(float* d, const u32* a, u32 b0, u32 b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <class T>
DEVICE u32 mul2(u32 a, u32 b) {
    return T::fma(a, b, 0x80008000u);
}

// --- memory --------------------------------------------------------------------------------------------------------

// Weights: read once, so they take no room in the L1. The bytes at p + AT.
template <int AT>
DEVICE uint4 stream16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "n"(AT));
    return v;
}
template <int AT>
DEVICE uint2 stream8(const void* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2 + %3];" : "=r"(v.x), "=r"(v.y) : "l"(p), "n"(AT));
    return v;
}
// Bring a line to the L2. It may be one that an earlier kernel is still writing: the L2 is where its bytes arrive.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// From Hopper on a kernel that calls this is launched before the one before it has ended (compress/cuda/compiler.py), and
// waits here for that. Nothing is read, and nothing written, before.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel after this one may be launched, if it waits so itself: when all blocks have called this or ended.
DEVICE void next_may_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Places in shared memory are passed as 32-bit numbers.
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory in the background; zeros, and nothing is read, where `there` is false.
DEVICE void copy16(u32 shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most N of this thread's latest groups of copies are still on their way.
template <int N>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Until so many threads of the block are here: those that call it with the same id (1 to 15).
DEVICE void barrier_some(int id, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8, and gets of each
// matrix the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
DEVICE void load_matrices(u32* r, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// --- arithmetic ----------------------------------------------------------------------------------------------------

// a b + c, clamped to 0 .. 1; NaN becomes 0.
DEVICE float fma_saturated(float a, float b, float c) {
    float d;
    asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// --- logic ---------------------------------------------------------------------------------------------------------

// (a & mask) | with, in one instruction
DEVICE u32 and_or(u32 a, u32 mask, u32 with) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(with));
    return d;
}

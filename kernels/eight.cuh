// The machine instructions that the 8-bit product needs beside those of device.cuh, each behind a name.
#pragma once
#include "device.cuh"

// D[16 x 8] += A[16 x 32] B[32 x 8] in 8-bit integers, by the 32 lanes of a warp
DEVICE void multiply8(int* d, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The largest number of a warp's 32, for each of its lanes.
DEVICE u32 largest(u32 n) {
    u32 d;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(d) : "r"(n));
    return d;
}

// The low bytes of four words, the first lowest.
DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
    u32 low, high, all;
    asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(low) : "r"(a), "r"(b));
    asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(high) : "r"(c), "r"(d));
    asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(all) : "r"(low), "r"(high));
    return all;
}

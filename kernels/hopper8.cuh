// What the 8-bit product needs of Hopper (sm_90a) beside hopper.cuh.
#pragma once
#include "hopper.cuh"

// Four 8 x 8 matrices of 16-bit numbers, each transposed: lane l has of each the numbers 2 (l % 4) and the next of row
// l / 4, two in a word, and gives the address of column l % 8 of matrix l / 8: eight numbers one after another.
DEVICE void store_transposed(u32 column, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(column), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// D[64 x N] += A[64 x 32] B[32 x N] in 8-bit integers. A: each warp holds 16 rows as for `multiply8`; D likewise,
// d[4 i ...] for columns 8 i; B: as `swizzled_rows` describes, N rows of 128 numbers; 32 bytes on are the next 32.
#define I4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define I8(i) I4(i), I4(i + 4)
#define I16(i) I4(i), I4(i + 4), I4(i + 8), I4(i + 12)
template <int N>
struct Product8 {
    DEVICE void add(int* d, const u32* a, u64 b) {
        if constexpr (N == 16)
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {"
                "%0, %1, %2, %3, %4, %5, %6, %7}, "
                "{%8, %9, %10, %11}, %12, 1;"
                : I8(0)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
        if constexpr (N == 32)
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {"
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                "{%16, %17, %18, %19}, %20, 1;"
                : I16(0)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
        if constexpr (N == 64)
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                "{%32, %33, %34, %35}, %36, 1;"
                : I16(0), I16(16)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
        if constexpr (N == 128)
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                "{%64, %65, %66, %67}, %68, 1;"
                : I16(0), I16(16), I16(32), I16(48)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
        if constexpr (N == 256)
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                "{%128, %129, %130, %131}, %132, 1;"
                : I16(0), I16(16), I16(32), I16(48), I16(64), I16(80), I16(96), I16(112)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

// What only Hopper has (sm_90a): tensor-core products by four warps together, barriers that count in shared memory,
// clusters of blocks that read each other's shared memory, and registers given from one warp to another.
#pragma once
#include "device.cuh"

// --- barriers: a phase is over when `count` arrivals have come; phases alternate between parity 0 and 1 ---------------

DEVICE void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Make initialised barriers visible to the cluster.
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and let the phase wait for so many bytes of copies too.
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Return when the phase of this parity is over.
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// --- copies to shared memory, which count their bytes at a barrier ----------------------------------------------------

// A matrix of 16-bit numbers in global memory and a box to cut out of it, as the driver describes them (128 bytes).
struct alignas(64) Boxes {
    u64 opaque[16];
};
// The box whose first number is at (row, column), rows of 128 bytes, swizzled (see `swizzled_rows`); outside: zeros.
DEVICE void copy_box(u32 shared, const Boxes* boxes, int row, int column, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared), "l"(boxes), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}
// Bytes that follow each other, a multiple of 16, to the L2. As `prefetch`.
DEVICE void prefetch_run(const void* global, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
// Bytes that follow each other, a multiple of 16.
DEVICE void copy_run(u32 shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// --- clusters ------------------------------------------------------------------------------------------------------

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A float in the shared memory of another block of the cluster, at the place where `mine` is in this one's.
DEVICE float4 read_cluster(const float* mine, u32 rank) {
    float4 v;
    asm volatile(
        "{.reg .u32 there; mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(shared_address(mine)), "r"(rank)
        : "memory");
    return v;
}

// --- registers -----------------------------------------------------------------------------------------------------

template <int COUNT>
DEVICE void registers_less() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- products by a warpgroup ---------------------------------------------------------------------------------------

// Before the first product, and after registers that one reads were written.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most N of the latest groups are still being computed.
template <int N>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Tell the compiler that a product read this register until now.
DEVICE void still_used(u32& r) { asm volatile("" : "+r"(r)::"memory"); }

// Describes 16-bit numbers in shared memory as [n][64], 128 bytes a row, whose 16-byte pieces are swizzled: piece p of
// row n lies at p ^ (n % 8). The place is a multiple of 1024 bytes; 32 bytes more are the next 16 columns.
DEVICE u64 swizzled_rows(const void* place) {
    const u64 address = shared_address(place);
    return (address & 0x3ffff) >> 4 | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R8(i) R4(i), R4(i + 4)
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define WGMMA_8(TYPE) \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3}, " \
        "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;" \
        : R4(0) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_16(TYPE) \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7}, " \
        "{%8, %9, %10, %11}, %12, 1, 1, 1, 0;" \
        : R8(0) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_32(TYPE) \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
        "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;" \
        : R16(0) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_64(TYPE) \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;" \
        : R16(0), R16(16) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_128(TYPE) \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;" \
        : R16(0), R16(16), R16(32), R16(48) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_256(TYPE) \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
        "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;" \
        : R16(0), R16(16), R16(32), R16(48), R16(64), R16(80), R16(96), R16(112) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// D[64 x N] += A[64 x 16] B[16 x N]. A: each warp holds 16 rows as for `mma`; D likewise, d[4 i ...] for columns 8 i;
// B: as `swizzled_rows` describes, N rows.
template <class T, int N>
struct Product;
template <int N>
struct Product<Half, N> {
    DEVICE void add(float* d, const u32* a, u64 b) {
        if constexpr (N == 8) WGMMA_8("f16");
        if constexpr (N == 16) WGMMA_16("f16");
        if constexpr (N == 32) WGMMA_32("f16");
        if constexpr (N == 64) WGMMA_64("f16");
        if constexpr (N == 128) WGMMA_128("f16");
        if constexpr (N == 256) WGMMA_256("f16");
    }
};
template <int N>
struct Product<BFloat, N> {
    DEVICE void add(float* d, const u32* a, u64 b) {
        if constexpr (N == 8) WGMMA_8("bf16");
        if constexpr (N == 16) WGMMA_16("bf16");
        if constexpr (N == 32) WGMMA_32("bf16");
        if constexpr (N == 64) WGMMA_64("bf16");
        if constexpr (N == 128) WGMMA_128("bf16");
        if constexpr (N == 256) WGMMA_256("bf16");
    }
};

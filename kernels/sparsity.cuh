// Sparse tensor cores: products with a matrix of which two of every four numbers of a row are kept, the others zero.
//
// D[16 x 8] += A[16 x 32] B[32 x 8]. Of A the lanes hold what is kept, as they hold a plain 16 x 16 matrix. Where in their
// four the two kept numbers belong is told by four bits, two a number, the lower position first: never twice the same.
// With g = lane / 4, a word holds them of 16 columns of two rows, four columns after four:
//
//     bits 0 - 15: row g          bits 16 - 31: row g + 8
//
// Of every four lanes two bring such words, the first for columns 0 - 15, the second for columns 16 - 31: with PAIR = 0
// lanes 4 g and 4 g + 1, with PAIR = 1 lanes 4 g + 2 and 4 g + 3. What the other two bring is not looked at.
// Of B a lane holds rows 8 i + 2 c and the next of column g in b[i], c = lane % 4: what `load_matrices` gives.
#pragma once
#include "device.cuh"

#define MMA_SPARSE(TYPE)                                                                                               \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                           \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),             \
                   "r"(positions), "n"(PAIR))
template <int PAIR>
DEVICE void mma_sparse(Half, float* d, const u32* a, const u32* b, u32 positions) {
    MMA_SPARSE("f16");
}
template <int PAIR>
DEVICE void mma_sparse(BFloat, float* d, const u32* a, const u32* b, u32 positions) {
    MMA_SPARSE("bf16");
}
#undef MMA_SPARSE

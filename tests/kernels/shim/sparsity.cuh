// kernels/sparsity.cuh for a CPU, by the layout that its comment has and PTX documents.
#pragma once
#include "device.cuh"

namespace shim {
struct SparseMatrices : Post {  // of an mma_sparse
    float* d;
    const u32 *a, *b;
    u32 positions;
};
template <int mantissa, int bias, int pair>
void multiply_sparse(Post* const* lanes, u32) {
    const SparseMatrices* of[32];
    for (int lane = 0; lane < 32; lane++) {
        of[lane] = (const SparseMatrices*)lanes[lane];
        if (!of[lane]) fault("lane %d left before an instruction that takes its whole warp", lane);
    }
    const auto number = [](u32 both, int half) { return widen<mantissa, bias>(both >> 16 * half & 0xffff); };
    float a[16][32] = {}, b[8][32];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < 2; e++) b[lane / 4][8 * i + lane % 4 * 2 + e] = number(of[lane]->b[i], e);
    for (int row = 0; row < 16; row++)
        for (int four = 0; four < 8; four++) {  // columns 4 four to 4 four + 3, kept columns 2 four and 2 four + 1
            const int g = row % 8, high = row / 8, half = four / 4, c = four % 4;
            const u32 places = of[4 * g + 2 * pair + half]->positions >> (16 * high + 4 * c) & 15;
            if ((places & 3) >= places >> 2) fault("mma_sparse: positions %u and %u", places & 3, places >> 2);
            const u32 kept = of[4 * g + c]->a[high + 2 * half];
            a[row][4 * four + (places & 3)] = number(kept, 0), a[row][4 * four + (places >> 2)] = number(kept, 1);
        }
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++)
            for (int k = 0; k < 32; k++) of[lane]->d[r] += a[lane / 4 + r / 2 * 8][k] * b[lane % 4 * 2 + r % 2][k];
}
}  // namespace shim

template <int pair, class Type>
DEVICE void mma_sparse(Type, float* d, const u32* a, const u32* b, u32 positions) {
    static_assert(pair == 0 || pair == 1, "two pairs of lanes");
    shim::SparseMatrices post = {
        {"mma_sparse", shim::multiply_sparse<Type::MANTISSA, Type::BIAS, pair>, ~0u}, d, a, b, positions};
    shim::collective(&post);
}

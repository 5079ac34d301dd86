// kernels/eight.cuh for a CPU.
#pragma once
#include "device.cuh"

namespace shim {
struct Matrices8 : Post {  // of a multiply8
    int* d;
    const u32* a;
    u32 b[2];
};
inline void multiply8(Post* const* lanes, u32) {
    signed char a[16][32], b[8][32];
    for (int lane = 0; lane < 32; lane++) {
        if (!lanes[lane]) fault("lane %d left before an instruction that takes its whole warp", lane);
        const Matrices8& m = *(const Matrices8*)lanes[lane];
        const int g = lane / 4, c = lane % 4 * 4;
        for (int i = 0; i < 4; i++) {
            for (int r = 0; r < 4; r++) a[g + r % 2 * 8][c + r / 2 * 16 + i] = (signed char)(m.a[r] >> 8 * i);
            for (int r = 0; r < 2; r++) b[g][c + r * 16 + i] = (signed char)(m.b[r] >> 8 * i);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) {
            u32 sum = ((Matrices8*)lanes[lane])->d[r];  // as the instruction, it wraps
            for (int k = 0; k < 32; k++) sum += a[lane / 4 + r / 2 * 8][k] * b[lane % 4 * 2 + r % 2][k];
            ((Matrices8*)lanes[lane])->d[r] = (int)sum;
        }
}
}  // namespace shim

DEVICE void multiply8(int* d, const u32* a, u32 b0, u32 b1) {
    shim::Matrices8 post = {{"multiply8", shim::multiply8, ~0u}, d, a, {b0, b1}};
    shim::collective(&post);
}
DEVICE u32 largest(u32 n) {
    for (int step = 16; step; step /= 2) n = max(n, __shfl_xor_sync(~0u, n, step));
    return n;
}
DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24; }

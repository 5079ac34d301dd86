// Arithmetic of 16-bit floats, and the instructions that a warp executes together.
#include "runtime.h"

#include <cmath>
#include <cstring>

namespace shim {
// --- 16-bit floats -------------------------------------------------------------------------------------------------

constexpr u32 canonical_nan = 0x7fff;

template <int mantissa, int bias>
float widen(u32 bits) {
    const u32 sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << (23 - mantissa);
    if (rest >> 23 == 2 * bias + 1) return __uint_as_float(sign | 0x7f800000 | rest);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * __uint_as_float((254 - bias) << 23)));
}
// To the nearest, ties to even.
template <int mantissa, int bias>
u32 narrow(double value) {
    constexpr u64 infinity = (2 * bias + 1) << mantissa;
    u64 bits;
    memcpy(&bits, &value, 8);
    const u32 sign = bits >> 48 & 0x8000;
    bits &= ~0ull >> 1;
    if (std::isnan(value)) return canonical_nan;
    if (std::isinf(value)) return sign | infinity;
    const int e = (int)(bits >> 52) - 1023 + bias;  // the exponent as it will be stored; below 1 it is a subnormal
    const int drop = 52 - mantissa + (e < 1 ? 1 - e : 0);
    if (drop > 53) return sign;
    const u64 digits = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    const u64 half = 1ull << (drop - 1), lost = digits & (2 * half - 1);
    const u64 kept = (digits >> drop) + (lost > half || (lost == half && (digits >> drop & 1)));
    const u64 result = ((u64)(e < 1 ? 0 : e - 1) << mantissa) + kept;  // the leading digit raises the exponent
    return sign | (u32)(result < infinity ? result : infinity);
}
// As if rounded once. The product is exact in double. Where the sum is not, it is moved to the neighbour with an odd
// last bit ("round to odd"): then it lies on the right side of every tie, and rounding it again does no harm.
template <int mantissa, int bias>
u32 fused(u32 a, u32 b, u32 c) {
    const double p = (double)widen<mantissa, bias>(a) * widen<mantissa, bias>(b), q = widen<mantissa, bias>(c);
    double sum = p + q;
    const double part = sum - p, error = (p - (sum - part)) + (q - part);  // exact
    u64 bits;
    memcpy(&bits, &sum, 8);
    if (std::isfinite(sum) && error != 0 && !(bits & 1)) sum = std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
    return narrow<mantissa, bias>(sum);
}

// --- instructions of a warp ------------------------------------------------------------------------------------------

void exchange_lanes(Post* const* lanes, u32) {
    for (u32 i = 0; i < 32; i++) {
        if (!lanes[i]) continue;
        Exchange& to = *(Exchange*)lanes[i];
        if (!lanes[to.from]) fault("%s: lane %u asks lane %u, which takes no part", to.name, i, to.from);
        to.got = ((Exchange*)lanes[to.from])->value;
    }
}
// For what takes a whole warp, by definition.
template <class Kind>
static Kind& lane_of(Post* const* lanes, int lane) {
    if (!lanes[lane]) fault("lane %d left before an instruction that takes its whole warp", lane);
    return *(Kind*)lanes[lane];
}
template <int mantissa, int bias>
void multiply(Post* const* lanes, u32) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; lane++) {
        const Matrices& m = lane_of<Matrices>(lanes, lane);
        const int g = lane / 4, c = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            for (int r = 0; r < 4; r++)
                a[g + r % 2 * 8][c + r / 2 * 8 + half] = widen<mantissa, bias>(m.a[r] >> 16 * half & 0xffff);
            for (int r = 0; r < 2; r++) b[g][c + r * 8 + half] = widen<mantissa, bias>(m.b[r] >> 16 * half & 0xffff);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) {
            const float *row = a[lane / 4 + r / 2 * 8], *column = b[lane % 4 * 2 + r % 2];
            float& d = lane_of<Matrices>(lanes, lane).d[r];
            for (int k = 0; k < 16; k++) d += row[k] * column[k];
        }
}
void load_rows(Post* const* lanes, u32) {
    const u8* rows[32];
    for (int lane = 0; lane < 32; lane++) {
        rows[lane] = shared_place("load_matrices", lane_of<Rows>(lanes, lane).row, 16, 16);
        const u32 owner = unpublished_by(rows[lane]);
        if (owner) fault("load_matrices: no __syncwarp since lane %u waited for a copy that is read", owner - 1);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            memcpy(lane_of<Rows>(lanes, lane).r + i, rows[i * 8 + lane / 4] + lane % 4 * 4, 4);
}

#define INSTANCES(...) \
    template float widen<__VA_ARGS__>(u32); \
    template u32 narrow<__VA_ARGS__>(double); \
    template u32 fused<__VA_ARGS__>(u32, u32, u32); \
    template void multiply<__VA_ARGS__>(Post* const*, u32);
INSTANCES(10, 15)
INSTANCES(7, 127)
}  // namespace shim


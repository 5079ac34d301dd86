// kernels/hopper8.cuh for a CPU.
#pragma once
#include "hopper.cuh"

namespace shim {
struct Columns : Post {  // of store_transposed
    u32 column, of[4];
};
inline void store_columns(Post* const* lanes, u32) {
    for (int m = 0; m < 4; m++)
        for (int j = 0; j < 8; j++) {
            if (!lanes[8 * m + j]) fault("a lane left before store_transposed");
            u16* to = (u16*)shared_place("store_transposed", ((Columns*)lanes[8 * m + j])->column, 16, 16);
            for (int r = 0; r < 8; r++) to[r] = (u16)(((Columns*)lanes[r * 4 + j / 2])->of[m] >> j % 2 * 16);
        }
}
}  // namespace shim
DEVICE void store_transposed(u32 column, u32 a, u32 b, u32 c, u32 d) {
    shim::Columns post = {{"store_transposed", shim::store_columns, ~0u}, column, {a, b, c, d}};
    shim::collective(&post);
}

template <int n>
struct Product8 {
    DEVICE void add(int* d, const u32* a, u64 b) { shim::enqueue(0, n, d, a, b); }
};

// Codes of 2, 3, 4 and 8 bits in "fragment order", and how they become 16-bit floats.
//
// The matrix is cut into tiles of 16 rows, these into chunks of 128 columns. Of a chunk each lane of a warp holds the 64
// weights that it must give to eight tensor-core steps of 16 columns: numbered by pairs, pair 4 s + r is register r of
// step s. With g = lane / 4 and c = lane % 4,
//
//     r = 0: row g,      columns 16 s + 2 c     and the next        r = 2: row g,      columns 16 s + 2 c + 8 and the next
//     r = 1: row g + 8,  the same columns                           r = 3: row g + 8,  the same columns
//
// A lane's 64 codes are 2 * WIDTH words (kernels/README.md draws them). The first code of a pair is in the low half of
// its word, the second 16 bits higher, so that one `and_or` turns both into floats 1024 + code (bfloat16: 128 + code).
#pragma once
#include "device.cuh"

#ifndef BAND
#define BAND 4
#endif
constexpr int TILE = 16;    // rows
constexpr int CHUNK = 128;  // columns
constexpr int STEPS = 8;    // tensor-core steps a chunk

// Bring a tile's part of a chunk to the L2, by a warp.
template <int BYTES>
DEVICE void prefetch_chunk(const u8* chunk, int lane) {
#pragma unroll
    for (int at = 0; at < BYTES; at += 1024)
        if (at + lane * 32 < BYTES) prefetch(chunk + at + lane * 32);
}

template <int WIDTH>
struct Words {
    static constexpr int COUNT = 2 * WIDTH;                           // a lane and chunk
    static constexpr int BYTES = TILE * CHUNK * WIDTH / 8;            // a chunk
    u32 w[COUNT];

    // From global memory, by a whole warp: `mine` is the chunk's first byte plus `place(lane)`.
    __device__ __forceinline__ void stream(const u8* mine, int lane) {
        if constexpr (COUNT >= 4) set<0>(stream16<0>(mine));
        if constexpr (COUNT >= 8) set<4>(stream16<512>(mine));
        if constexpr (COUNT >= 12) set<8>(stream16<1024>(mine)), set<12>(stream16<1536>(mine));
        if constexpr (COUNT == 6) {
            const uint2 v = stream8<512>(mine - lane * 8);
            w[4] = v.x, w[5] = v.y;
        }
    }
    static __device__ __forceinline__ int place(int lane) { return lane * 16; }
    template <int FIRST>
    __device__ __forceinline__ void set(const uint4& v) {
        w[FIRST] = v.x, w[FIRST + 1] = v.y, w[FIRST + 2] = v.z, w[FIRST + 3] = v.w;
    }
    // From shared memory, where the chunk lies as it does in global memory.
    __device__ __forceinline__ void read(const u8* chunk, int lane) {
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++) {
            const uint4 v = *(const uint4*)(chunk + i * 512 + lane * 16);
            w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
        }
        if (COUNT % 4) {
            const uint2 v = *(const uint2*)(chunk + COUNT / 4 * 512 + lane * 8);
            w[COUNT - 2] = v.x, w[COUNT - 1] = v.y;
        }
    }

    // The two codes of pair p, each in its half: code | code << 16.
    __device__ __forceinline__ u32 codes(int p) const {
        constexpr u32 mask = ((1u << WIDTH) - 1) * 0x10001u;
        if (WIDTH == 3 && p >= 30) return top(p);
        constexpr int each = WIDTH == 3 ? 5 : 16 / WIDTH;
        return (w[p / each] >> (p % each * WIDTH)) & mask;
    }
    // 3 bits: the last two pairs lie in the top bits of the halves of words 0 - 2 and 3 - 5.
    __device__ __forceinline__ u32 top(int p) const {
        const int i = (p - 30) * 3;
        return and_or(w[i] >> 15, 0x10001u, and_or(w[i + 1] >> 14, 0x20002u, (w[i + 2] >> 13) & 0x40004u));
    }
};

// Both codes of pair p less 2^(WIDTH - 1), exactly, as two floats of type T.
template <class T, int WIDTH>
DEVICE u32 centred(const Words<WIDTH>& words, int p) {
    constexpr u32 one = T::BIAS << T::MANTISSA, base = 1u << T::MANTISSA, middle = 1u << (WIDTH - 1);
    constexpr u32 magic = (T::BIAS + T::MANTISSA) << T::MANTISSA;  // `base` as a float: its last bit counts one
    constexpr u32 minus = 0x8000u;
    if (WIDTH > T::MANTISSA) {  // 8 bits do not fit into bfloat16's 7: the halves of a code apart, then 16 high + low
        const u32 w = words.w[p / 2] >> (p % 2 * 8);
        const u32 low = and_or(w, 0x000f000fu, magic * 0x10001u), high = and_or(w >> 4, 0x000f000fu, magic * 0x10001u);
        constexpr u32 sixteen = whole<T::MANTISSA, T::BIAS>(16);
        const u32 l = T::fma(low, one * 0x10001u, (minus | whole<T::MANTISSA, T::BIAS>(base)) * 0x10001u);
        const u32 h = T::fma(high, one * 0x10001u, (minus | whole<T::MANTISSA, T::BIAS>(base + 8)) * 0x10001u);
        return T::fma(h, sixteen * 0x10001u, l);
    }
    constexpr int each = WIDTH == 3 ? 5 : 16 / WIDTH;
    constexpr int reach = T::MANTISSA / WIDTH * WIDTH;  // codes that begin below this bit need no shift
    const int bit = WIDTH == 3 && p >= 30 ? 0 : p % each * WIDTH;
    const int shift = bit / (reach ? reach : 1) * reach, place = bit - shift;
    const u32 word = WIDTH == 3 && p >= 30 ? words.top(p) : words.w[p / each] >> shift;
    const u32 v = and_or(word, (((1u << WIDTH) - 1) << place) * 0x10001u, magic * 0x10001u);  // base + code * 2^place
    const u32 down = (u32)(T::BIAS - place) << T::MANTISSA;                                  // 2^-place
    const u32 away = minus | whole<T::MANTISSA, T::BIAS>((base >> place) + middle);
    return T::fma(v, down * 0x10001u, away * 0x10001u);
}

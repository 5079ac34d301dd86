// What the kernels know of a packed kind: how a lane loads its part of a chunk, turns codes into 16-bit floats, and
// which scale and offset a group of columns has. One struct a kind, chosen by the macro KIND:
//
//     GRID     uniform integers:    w = s (code - middle) + o,      o = 0, - s (zero - middle), or minimum + s middle
//     TABLE    a table for all:     w = s table[code]               (NF4, FP4)
//     BOOK     a table for a row:   w = book[row][code]             (k-means)
//     BILEVEL  as GRID, in groups of 16 columns whose s and zero are themselves small integers on grids (SpQR)
//
// `pair` gives code - middle, or the table's number. narrow.cu sums x times that over a group in the tensor cores, and x
// itself where there are offsets, and applies s and o (`group`) to those sums in float32: no rounding of a weight enters.
// The others take the weight itself, rounded to T (`weight`). All lanes `settle` a chunk when its statistics are there.
//
// single.cu needs of each lane's statistics only those of steps 2 c and 2 c + 1 (c = lane % 4): `Weights<T, true>` holds
// no more, and its `group` takes 0 or 1 for these steps.
//
// `prepare_pairs` and `prepare_weights` put tables into shared memory. A table for all is known when the kernel is compiled
// (the macro NUMBERS, tables.cuh): it waits for no memory, so that this can be done while the first weights are on their way.
#pragma once
#include "codes.cuh"
#include "tables.cuh"

#define GRID 0
#define TABLE 1
#define BOOK 2
#define BILEVEL 3

// How statistics are stored: for each group two numbers side by side, for rows g and g + 8. `get` finds the one for group
// `i` and half 0 (row g) or 1 among the words of a lane.
struct Float {
    static constexpr int BYTES = 8;  // of two
    static __device__ __forceinline__ float get(const u32* w, int i, int half) { return __uint_as_float(w[2 * i + half]); }
    static __device__ __forceinline__ float one(const u8* p, u64 index) { return ((const float*)p)[index]; }
};
template <class S>
struct Short {
    static constexpr int BYTES = 4;
    static __device__ __forceinline__ float get(const u32* w, int i, int half) { return half ? S::high(w[i]) : S::low(w[i]); }
    static __device__ __forceinline__ float one(const u8* p, u64 index) { return S::low(((const u16*)p)[index]); }
};
struct Byte {
    static constexpr int BYTES = 2;
    static __device__ __forceinline__ float get(const u32* w, int i, int half) {
        return (float)(w[i / 2] >> (i % 2 * 16 + half * 8) & 255);
    }
};
template <class S>
struct Stored {
    typedef Short<S> Type;
};
template <>
struct Stored<Float> {
    typedef Float Type;
};

// BYTES bytes as words, in as few loads as there can be.
template <int BYTES>
struct Statistics {
    u32 w[(BYTES + 3) / 4];
    __device__ __forceinline__ void load(const u8* p) {
        if constexpr (BYTES == 2) w[0] = *(const u16*)p;
        if constexpr (BYTES == 4) w[0] = *(const u32*)p;
        if constexpr (BYTES == 8) {
            const uint2 v = *(const uint2*)p;
            w[0] = v.x, w[1] = v.y;
        }
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) {
            const uint4 v = ((const uint4*)p)[i];
            w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
        }
    }
};

// Where the tensors of a layer are; what a kind does not have is null.
struct Layer {
    const u8* codes;    // [band][chunk][tile of the band], see codes.cuh
    const u8* scales;   // [tile][chunk or group][8 rows g][groups of the chunk][row g, row g + 8]
    const u8* offsets;  // likewise: zero points or minima
    const u8* table;    // of a BOOK [row][2^BITS], as scales are stored
    int chunks;         // of a row of tiles
    int shift;          // a group covers 2^shift chunks; 31: the whole row

    // First byte of a tile's first chunk; the next chunk follows after those of the other tiles of the band.
    __device__ __forceinline__ const u8* row(int tile, int bytes) const {
        return codes + ((u64)(tile / BAND) * chunks * BAND + tile % BAND) * bytes;
    }
    // How many statistics a row of tiles has (of `groups` a chunk, or one a longer group), and which is a chunk's.
    __device__ __forceinline__ int count() const { return shift >= 31 ? 1 : (chunks + (1 << shift) - 1) >> shift; }
    __device__ __forceinline__ int index(int chunk) const { return chunk >> shift; }
};

#if KIND == GRID
#ifndef OFFSET
#define OFFSET 0
#endif
template <class T, bool ONE = false>
struct Weights {
    static constexpr int GROUP_STEPS = STEPS / GROUPS, HELD = ONE ? (GROUPS + 3) / 4 : GROUPS;
    static constexpr bool HAS_OFFSET = OFFSET != 0;
    static constexpr int SHARED_PAIRS = 0, SHARED_WEIGHTS = 0;
    typedef typename Stored<SCALE>::Type Scale;
#if OFFSET == 1
    typedef Byte Offset;
#else
    typedef typename Stored<SCALE>::Type Offset;
#endif
    static constexpr int SCALE_BYTES = GROUPS * Scale::BYTES, OFFSET_BYTES = GROUPS * Offset::BYTES;  // two rows, a chunk
    Words<BITS> words;
    Statistics<HELD * Scale::BYTES> scale;
    Statistics<HELD * Offset::BYTES> offset;

    static __device__ __forceinline__ void prepare_pairs(u8*, const Layer&, int, int) {}
    static __device__ __forceinline__ void prepare_weights(u8*, const Layer&, int, int) {}

    // Where a lane finds the statistics of a row of tiles.
    struct Place {
        const u8 *scales, *offsets;
        __device__ __forceinline__ Place(const Layer& layer, int tile, int lane) {
            const u64 first = (u64)tile * layer.count() * 8 + lane / 4;
            const int own = ONE ? lane % 4 * GROUPS / 4 : 0;
            scales = layer.scales + first * SCALE_BYTES + own * Scale::BYTES;
            offsets = layer.offsets + first * OFFSET_BYTES + own * Offset::BYTES;
        }
    };
    __device__ __forceinline__ void statistics(const Place& place, int index) {
        scale.load(place.scales + index * (8 * SCALE_BYTES));
        if (HAS_OFFSET) offset.load(place.offsets + index * (8 * OFFSET_BYTES));
    }
    __device__ __forceinline__ void settle() {}
    __device__ __forceinline__ u32 pair(const u8*, int p) const { return centred<T, BITS>(words, p); }

    // For row g (half 0) or g + 8 (half 1) of a group of the chunk.
    __device__ __forceinline__ void group(int index, int half, float& s, float& o) const {
        index %= HELD;
        s = Scale::get(scale.w, index, half);
        constexpr float middle = 1 << (BITS - 1);
        if (OFFSET == 1) o = s * (middle - Offset::get(offset.w, index, half));
        if (OFFSET == 2) o = fmaf(s, middle, Offset::get(offset.w, index, half));
    }

    // Both weights of pair p.
    __device__ __forceinline__ u32 weight(const u8* shared, int p) const {
        const int index = p / 4 / GROUP_STEPS;
        float s, o = 0;
        group(index, p % 2, s, o);
        const u32 v = pair(shared, p), scale = T::pack(s, s);
        if (OFFSET == 0) return mul2<T>(v, scale);
        if (OFFSET == 2) return T::fma(v, scale, T::pack(o, o));
        const float away = (float)(1 << (BITS - 1)) - Offset::get(offset.w, index, p % 2);  // code - zero is exact in T
        return mul2<T>(T::fma(v, (T::BIAS << T::MANTISSA) * 0x10001u, T::pack(away, away)), scale);
    }
};

#elif KIND == TABLE
// Codes lie as bytes of two: the lower half is the first of the pair. For `pair` a byte finds both numbers, rounded to T,
// in shared memory, where each of its 256 values has them 32 times over, once for each lane, so that no two lanes want
// the same bank. For `weight` a code finds its float likewise, and the product with the scale is rounded once.
template <class T, bool ONE = false>
struct Weights {
    static constexpr int GROUP_STEPS = STEPS / GROUPS, HELD = ONE ? (GROUPS + 3) / 4 : GROUPS;
    static constexpr bool HAS_OFFSET = false;
    static constexpr int SHARED_PAIRS = 256 * 32 * 4, SHARED_WEIGHTS = 16 * 32 * 4;
    static constexpr int SCALE_BYTES = GROUPS * Float::BYTES;
    Words<4> words;
    Statistics<HELD * Float::BYTES> scale;

    static __device__ __forceinline__ void prepare_pairs(u8* shared, const Layer&, int, int threads) {
        const float number = number_of(threadIdx.x % 16);
        for (int i = threadIdx.x; i < 256 * 8; i += threads) {
            const u32 both = T::pack(__shfl_sync(~0u, number, i / 8 % 16), __shfl_sync(~0u, number, i / 128));
            ((uint4*)shared)[i] = make_uint4(both, both, both, both);
        }
    }
    static __device__ __forceinline__ void prepare_weights(u8* shared, const Layer&, int, int threads) {
        const float number = number_of(threadIdx.x % 16);
        for (int i = threadIdx.x; i < 16 * 32; i += threads) ((float*)shared)[i] = __shfl_sync(~0u, number, i / 32);
    }
    struct Place {
        const u8* scales;
        __device__ __forceinline__ Place(const Layer& layer, int tile, int lane) {
            scales = layer.scales + ((u64)tile * layer.count() * 8 + lane / 4) * SCALE_BYTES;
            if (ONE) scales += lane % 4 * GROUPS / 4 * Float::BYTES;
        }
    };
    __device__ __forceinline__ void statistics(const Place& place, int index) {
        scale.load(place.scales + index * (8 * SCALE_BYTES));
    }
    __device__ __forceinline__ void settle() {}
    __device__ __forceinline__ u32 pair(const u8* shared, int p) const {
        const u32 w = words.w[p / 4];
        const int at = p % 4 * 8;  // of the byte; times 128, the bytes of a row of the table
        const u32 row = at >= 8 ? (w >> (at - 7)) & 0x7f80u : (w << 7) & 0x7f80u;
        return *(const u32*)(shared + row + threadIdx.x % 32 * 4);
    }
    __device__ __forceinline__ void group(int index, int half, float& s, float& o) const {
        s = Float::get(scale.w, index % HELD, half);
    }

    __device__ __forceinline__ u32 weight(const u8* shared, int p) const {
        const float s = Float::get(scale.w, p / 4 / GROUP_STEPS, p % 2);
        const u32 both = words.w[p / 4] >> (p % 4 * 8);
        const float* own = (const float*)shared + threadIdx.x % 32;
        return T::pack(s * own[(both & 15) * 32], s * own[(both >> 4 & 15) * 32]);
    }
};

#elif KIND == BOOK
template <class T, bool ONE = false>
struct Weights {
    static constexpr int GROUP_STEPS = STEPS;
    static constexpr bool HAS_OFFSET = false;
    static constexpr int ENTRIES = 1 << BITS, PITCH = ENTRIES + 2;  // numbers a row; two more keep rows off one bank
    static constexpr int SHARED_PAIRS = TILE * PITCH * 2, SHARED_WEIGHTS = SHARED_PAIRS;  // a tile
    Words<BITS> words;

    static __device__ __forceinline__ void prepare_pairs(u8* shared, const Layer& layer, int tile, int threads) {
        for (int i = threadIdx.x; i < TILE * ENTRIES; i += threads)
            ((u16*)shared)[i / ENTRIES * PITCH + i % ENTRIES] =
                (u16)T::pack(Stored<SCALE>::Type::one(layer.table, (u64)tile * TILE * ENTRIES + i), 0.0f);
    }
    static __device__ __forceinline__ void prepare_weights(u8* shared, const Layer& layer, int tile, int threads) {
        prepare_pairs(shared, layer, tile, threads);
    }
    struct Place {
        __device__ __forceinline__ Place(const Layer&, int, int) {}
    };
    __device__ __forceinline__ void statistics(const Place&, int) {}
    __device__ __forceinline__ void settle() {}
    __device__ __forceinline__ u32 pair(const u8* shared, int p) const {
        const u16* book = (const u16*)shared + (threadIdx.x % 32 / 4 + p % 2 * 8) * PITCH;
        const u32 both = words.codes(p);
        return book[both & 0xffff] | (u32)book[both >> 16] << 16;
    }
    __device__ __forceinline__ void group(int, int, float& s, float& o) const { s = 1.0f; }
    __device__ __forceinline__ u32 weight(const u8* shared, int p) const { return pair(shared, p); }
};

#elif KIND == BILEVEL
// Statistics of a chunk: for each row g of eight 16 bytes, of which byte 2 j is row g's in group j and byte 2 j + 1 row
// g + 8's: the scale's code in its lower half, the zero's in the upper. Then, once for the 16 rows, of each of the eight
// groups four numbers: the grid of the scales (scale, zero) and that of the zeros.
//
// Each of the four lanes of a row works two groups out (`settle`) and the others, where they need them, ask it.
template <class T, bool ONE = false>
struct Weights {
    static constexpr int GROUP_STEPS = 1;
    static constexpr bool HAS_OFFSET = true;
    static constexpr int SHARED_PAIRS = 0, SHARED_WEIGHTS = 0;
    Words<BITS> words;
    u32 codes;    // of two groups and two rows
    uint4 grids;  // of two groups
    float own[2][2][2];  // group, row, scale and offset

    static __device__ __forceinline__ void prepare_pairs(u8*, const Layer&, int, int) {}
    static __device__ __forceinline__ void prepare_weights(u8*, const Layer&, int, int) {}

    struct Place {
        const u32* codes;
        const uint4* grids;
        __device__ __forceinline__ Place(const Layer& layer, int tile, int lane) {
            codes = (const u32*)layer.scales + (u64)tile * layer.chunks * 32 + lane;
            grids = (const uint4*)layer.offsets + (u64)tile * layer.chunks * 4 + lane % 4;
        }
    };
    __device__ __forceinline__ void statistics(const Place& place, int index) {
        codes = place.codes[index * 32];
        grids = place.grids[index * 4];
    }
    __device__ __forceinline__ void settle() {
        constexpr float middle = 1 << (BITS - 1);
        const u32 grid[2][2] = {{grids.x, grids.y}, {grids.z, grids.w}};
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 code = codes >> (j * 16 + half * 8);
                const float s = SCALE::low(grid[j][0]) * (number(code) - SCALE::high(grid[j][0]));
                const float zero = SCALE::low(grid[j][1]) * (number(code >> 4) - SCALE::high(grid[j][1]));
                own[j][half][0] = s;
                own[j][half][1] = s * (middle - zero);
            }
    }
    __device__ __forceinline__ u32 pair(const u8*, int p) const { return centred<T, BITS>(words, p); }

    __device__ __forceinline__ void group(int index, int half, float& s, float& o) const {
        s = own[index % 2][half][0], o = own[index % 2][half][1];
        if (!ONE) s = __shfl_sync(~0u, s, index / 2, 4), o = __shfl_sync(~0u, o, index / 2, 4);
    }
    __device__ __forceinline__ u32 weight(const u8* shared, int p) const {
        float s, o;
        group(p / 4, p % 2, s, o);
        const u32 v = pair(shared, p);
        return T::pack(fmaf(s, T::low(v), o), fmaf(s, T::high(v), o));
    }
    // The lowest four bits.
    static __device__ __forceinline__ float number(u32 n) { return __uint_as_float(and_or(n, 15, 0x4b000000u)) - 8388608.0f; }
};
#endif

// What a lane has of a tile of a chunk, and its products with inputs: all weights of 128 columns, or those that are kept
// where 256 columns are pruned 2:4. These lie as the weights of any 128 columns (codes.cuh); behind them 512 bytes say where
// they belong (sparsity.cuh). Of these each lane has four words. Word i serves steps 2 i and 2 i + 1: lanes 0 and 1 of
// every four have what the first of these two steps looks at, lanes 2 and 3 what the second does. Statistics are those
// of weights.cuh with the kept columns counted.
#pragma once
#include "sparsity.cuh"
#include "weights.cuh"

template <class T, bool PRUNED>
struct Tile {
    static constexpr int BYTES = Words<BITS>::BYTES;
    Weights<T> weights;

    // `mine`: the chunk's first byte plus what Words::place says
    __device__ __forceinline__ void stream(const u8* mine, int lane) { weights.words.stream(mine, lane); }
    // d += the step's columns of a matrix with the places of this one, times b: the inputs of two steps
    __device__ __forceinline__ void multiply(float* d, const u32* a, const u32* b, int step) const {
        T::mma(d, a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
    }
};

template <class T>
struct Tile<T, true> {
    static constexpr int BYTES = Words<BITS>::BYTES + 512;
    Weights<T> weights;
    u32 positions[STEPS / 2];

    __device__ __forceinline__ void stream(const u8* mine, int lane) {
        weights.words.stream(mine, lane);
        const uint4 v = stream16<Words<BITS>::BYTES>(mine);
        positions[0] = v.x, positions[1] = v.y, positions[2] = v.z, positions[3] = v.w;
    }
    // b: the inputs of one step
    __device__ __forceinline__ void multiply(float* d, const u32* a, const u32* b, int step) const {
        if (step % 2 == 0) {
            mma_sparse<0>(T(), d, a, b, positions[step / 2]);
        } else {
            mma_sparse<1>(T(), d, a, b, positions[step / 2]);
        }
    }
};

// How the 8-bit product's numbers lie: signed codes that go into the tensor cores as they are.
//
// Weights lie in tiles of 16 rows, bands of tiles and chunks of 128 columns, 2048 bytes each, as `Words<8>` reads them:
// a lane's words 4 s to 4 s + 3 are its part of the 16-row operand of tensor-core step s, which has 32 columns. With
// g = lane / 4 and c = lane % 4,
//
//     word 4 s:     row g,     columns 32 s + 4 c to + 3      word 4 s + 2: row g,     columns 32 s + 16 + 4 c to + 3
//     word 4 s + 1: row g + 8, the same columns               word 4 s + 3: row g + 8, the same columns
//
// The outlier columns' 16-bit weights lie so too, byte for byte: a chunk has 64 of these columns, a step 16. An input
// is a row of 128 bytes for each chunk of codes and then for each chunk of outliers; quantise.cu makes it.
#pragma once
#include "codes.cuh"
#include "eight.cuh"

constexpr int WEIGHT_BYTES = Words<8>::BYTES;   // of a tile's chunk
constexpr int INPUT_BYTES = CHUNK;              // of a token's chunk
constexpr int OUTLIER_CHUNK = INPUT_BYTES / 2;  // columns
constexpr int STEPS8 = 4;                       // tensor-core steps a chunk

// A tile's part of a chunk, one of `count`. The next chunk is BAND times WEIGHT_BYTES further.
DEVICE const u8* part_of(const u8* weights, int tile, int chunk, int count) {
    return weights + (((u64)(tile / BAND) * count + chunk) * BAND + tile % BAND) * WEIGHT_BYTES;
}

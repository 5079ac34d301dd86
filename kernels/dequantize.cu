// The dense weight [rows, columns] of a packed layer, for products that a library does.
//
// A warp makes one chunk of 16 rows and 128 columns, puts it in order in shared memory and writes whole lines.
//
// Macros: KIND and what it asks for (weights.cuh); T: Half or BFloat, the type of the weight; WARPS.
#include "weights.cuh"

constexpr int PITCH = CHUNK * 2 + 16;  // bytes of a row in shared memory: rows fall on different banks

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    dequantize(const u8* codes, const u8* scales, const u8* offsets, const u8* table, u16* out, int rows, int columns,
               int chunks, int shift) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.y;
    const int chunk = blockIdx.x * WARPS + warp;
    const Layer layer = {codes, scales, offsets, table, chunks, shift};
    u8* own = shared + Weights<T>::SHARED_WEIGHTS + warp * TILE * PITCH;

    Weights<T> weights;
    if (chunk < chunks) {
        constexpr int bytes = Words<BITS>::BYTES;
        weights.words.stream(layer.row(tile, bytes) + (u64)chunk * (BAND * bytes) + Words<BITS>::place(lane), lane);
        weights.statistics(typename Weights<T>::Place(layer, tile, lane), layer.index(chunk));
        weights.settle();
    }
    Weights<T>::prepare_weights(shared, layer, tile, WARPS * 32);
    if (Weights<T>::SHARED_WEIGHTS) __syncthreads();
    if (chunk >= chunks) return;
#pragma unroll
    for (int p = 0; p < 4 * STEPS; p++) {
        const int row = lane / 4 + p % 2 * 8, column = p / 4 * 16 + lane % 4 * 2 + p / 2 % 2 * 8;
        *(u32*)(own + row * PITCH + column * 2) = weights.weight(shared, p);
    }
    __syncwarp();
    const int first_row = tile * TILE, first_column = chunk * CHUNK;
    if (columns % 8 == 0) {
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) {
            const int row = 2 * i + lane / 16, column = lane % 16 * 8;
            if (first_row + row < rows && first_column + column < columns)
                *(uint4*)(out + (u64)(first_row + row) * columns + first_column + column) =
                    *(const uint4*)(own + row * PITCH + column * 2);
        }
    } else {
        for (int i = lane; i < TILE * CHUNK; i += 32) {
            const int row = i / CHUNK, column = i % CHUNK;
            if (first_row + row < rows && first_column + column < columns)
                out[(u64)(first_row + row) * columns + first_column + column] = *(const u16*)(own + row * PITCH + column * 2);
        }
    }
}

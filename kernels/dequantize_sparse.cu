// The dense weight of a layer on a uniform grid of which two of every four in a row are kept: out[rows, columns] in T.
//
// Macros: BITS, SCALE, GROUPS (of a chunk's kept columns), OFFSET: see weights.cuh; T: Half or BFloat; WARPS.
#define KIND 0  // GRID
#include "tile.cuh"

constexpr int WIDTH = 2 * CHUNK;  // columns of a chunk
constexpr int CHUNK_BYTES = Tile<T, true>::BYTES;
constexpr int PITCH = WIDTH * 2 + 32;  // bytes of a row in shared memory: four rows of what a lane writes fill the banks

// Columns are a multiple of 4. A warp makes one chunk, puts it in order in shared memory and writes whole lines.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    dequantize_sparse(const u8* codes, const u8* scales, const u8* offsets, u16* out, int rows, int columns, int chunks,
                      int shift) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.y;
    const int chunk = blockIdx.x * WARPS + warp, g = lane / 4, c = lane % 4;
    const Layer layer = {codes, scales, offsets, nullptr, chunks, shift};
    u8* own = shared + warp * TILE * PITCH;
    if (chunk >= chunks) return;

    Tile<T, true> held;
    held.stream(layer.row(tile, CHUNK_BYTES) + (u64)chunk * (BAND * CHUNK_BYTES) + Words<BITS>::place(lane), lane);
    held.weights.statistics(Weights<T>::Place(layer, tile, lane), layer.index(chunk));
#pragma unroll
    for (int p = 0; p < 4 * STEPS; p += 2) {  // pairs p and p + 1: rows g and g + 8
        const int step = p / 4, half = p / 2 % 2;
        const u32 word = __shfl_sync(~0u, held.positions[step / 2], 4 * g + step % 2 * 2 + half);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 both = held.weights.weight(shared, p + r), places = word >> (16 * r + 4 * c) & 15;
            const u64 four = (u64)(both & 0xffff) << (places & 3) * 16 | (u64)(both >> 16) << (places >> 2) * 16;
            *(uint2*)(own + (g + 8 * r) * PITCH + (step * 32 + half * 16 + c * 4) * 2) =
                make_uint2((u32)four, (u32)(four >> 32));
        }
    }
    __syncwarp();
    const int first_row = tile * TILE, first_column = chunk * WIDTH;
#pragma unroll
    for (int i = 0; i < 2 * TILE; i++) {
        const int row = i / 2, column = i % 2 * CHUNK + lane * 4;
        if (first_row + row < rows && first_column + column < columns)
            *(uint2*)(out + (u64)(first_row + row) * columns + first_column + column) =
                *(const uint2*)(own + row * PITCH + column * 2);
    }
}

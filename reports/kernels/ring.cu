// What compute-sanitizer's racecheck makes of a ring of two stages that a bulk copy fills again and again:
//   nvcc -arch=sm_90a -o ring reports/kernels/ring.cu && for i in 0 1 2; do compute-sanitizer --tool racecheck ./ring $i; done
// 0: every thread that has read a stage arrives at its barrier; 1: of each warp one lane, after __syncwarp; 2: one thread, after
// a named barrier. All three are correct.
#include <cstdint>
#include <cstdio>
typedef uint32_t u32;
typedef uint64_t u64;

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ void arrive(u64* barrier) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}
__device__ void wait(u64* barrier, u32 parity) {
    asm volatile("{.reg .pred done;\nagain: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;}" ::"r"(
                     shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

template <int MODE>
__global__ void __launch_bounds__(160) ring(const u32* in, u32* out, int turns) {
    extern __shared__ __align__(1024) u32 stages[];
    __shared__ u64 full[2], empty[2];
    const int t = threadIdx.x;
    if (t == 0) {
        for (int i = 0; i < 2; i++) init(full + i, 1), init(empty + i, MODE == 0 ? 128 : MODE == 1 ? 4 : 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (t >= 128) {
        for (int i = 0; t == 128 && i < turns; i++) {
            if (i >= 2) wait(empty + i % 2, (i / 2 - 1) & 1);
            const u32 barrier = shared_address(full + i % 2);
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 4096;" ::"r"(barrier) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 4096, [%2];" ::"r"(
                             shared_address(stages + i % 2 * 1024)),
                         "l"(in + i * 1024), "r"(barrier)
                         : "memory");
        }
        return;
    }
    u32 sum = 0;
    for (int i = 0; i < turns; i++) {
        wait(full + i % 2, i / 2 & 1);
        for (int j = 0; j < 8; j++) sum += stages[i % 2 * 1024 + (t * 7 + j * 128) % 1024];
        if (MODE == 0) arrive(empty + i % 2);
        if (MODE == 1) __syncwarp();
        if (MODE == 2) asm volatile("barrier.sync 1, 128;" ::: "memory");
        if (MODE == 1 && t % 32 == 0 || MODE == 2 && t == 0) arrive(empty + i % 2);
    }
    out[t] = sum;
}

int main(int count, char** words) {
    const int mode = count > 1 ? words[1][0] - '0' : 0;
    u32 *in, *out;
    cudaMalloc(&in, 65536), cudaMalloc(&out, 8192), cudaMemset(in, 1, 65536);
    if (mode == 0) ring<0><<<2, 160, 8192>>>(in, out, 8);
    if (mode == 1) ring<1><<<2, 160, 8192>>>(in, out, 8);
    if (mode == 2) ring<2><<<2, 160, 8192>>>(in, out, 8);
    printf("mode %d: %s\n", mode, cudaGetErrorString(cudaDeviceSynchronize()));
}

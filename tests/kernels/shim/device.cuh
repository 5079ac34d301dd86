// kernels/device.cuh for a CPU: the same names, and those that CUDA has built in, so that g++ compiles the kernels as
// they are. The .cpp files beside it, compiled once for all kernels, do the work; emulate.py builds and launches.
//
// Not emulated: that a shuffle, `load_matrices` or `mma` does not order memory between lanes as __syncwarp does (it is
// seen only of copies that `load_matrices` reads); blocks that wait for each other outside of a cluster; float32
// without denormal numbers.
#pragma once
#include <type_traits>
#include <utility>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef decltype(sizeof 0) size_t;  // NVRTC knows it

// --- the language --------------------------------------------------------------------------------------------------

// emulate.py itself reads and takes away __global__, __launch_bounds__ and __cluster_dims__.
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // the one storage class that `extern` and a declaration in a function both take
#define DEVICE static __device__ __forceinline__

struct dim3 {
    u32 x, y, z;
    dim3(u32 x = 1, u32 y = 1, u32 z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEVICE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- what the names are made of ------------------------------------------------------------------------------------

namespace shim {
constexpr u32 shared_room = 256 << 10;

struct Shape {
    dim3 grid, block, cluster;
    u32 shared_bytes;
    u32 falling;  // blocks, warps and lanes take their turns from the last to the first
};
struct Thread {
    dim3 index;
    u32 lane;
};
struct Group {
    dim3 index;
    u32 rank;  // in its cluster
};
extern Shape shape;
extern Thread* me;  // whose turn it is; null: the scheduler's
extern Group* block;
extern u8* memory;  // the block's shared memory, its static arrays too

// Ends the launch.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...);

// What a lane brings to an instruction of its whole warp. `run` is called once, with what the lanes in `mask` brought
// (null: the lane has left), when all of them are there.
struct Post {
    const char* name;
    void (*run)(Post* const* lanes, u32 mask);
    u32 mask;
};
void collective(Post* post);

// Barrier `id` of `count` threads of the block; 0: of all that have not left. `arrive` does not wait.
void wait(u32 id, u32 count);
void arrive(u32 id, u32 count);

// Until `ready()`, which other threads bring about; `what` is named where they never do.
void poll(const char* what);
void polled();
template <class Condition>
void await(const char* what, Condition ready) {
    if (ready()) return;
    do poll(what);
    while (!ready());
    polled();
}

void cluster_wait();
u8* peer(const void* mine, u32 rank);  // where another block of the cluster has what this one has at `mine`

bool is_shared(const void* p);
u8* shared_place(const char* name, u32 address, u32 alignment, u32 bytes);  // what shared_address made a number of
void check_global(const char* name, const void* p, u32 alignment);
void copy(u8* to, const void* from, bool there);
void commit();
void land(u32 most);  // all copies but those of the latest `most` groups
void publish();       // from here on other lanes may read what landed

template <int mantissa, int bias> float widen(u32 bits);
template <int mantissa, int bias> u32 narrow(double value);
template <int mantissa, int bias> u32 fused(u32 a, u32 b, u32 c);  // a b + c

struct Exchange : Post {  // of numbers between lanes
    u64 value, got;
    u32 from;
};
struct Matrices : Post {  // of an mma
    float* d;
    const u32* a;
    u32 b[2];
};
struct Rows : Post {  // of load_matrices
    u32* r;
    u32 row;
};
void exchange_lanes(Post* const* lanes, u32);
template <int mantissa, int bias> void multiply(Post* const* lanes, u32);
void load_rows(Post* const* lanes, u32);

// A kernel's parameters: a letter for each (p a pointer, c a pointer to constants, f float, i and u whole numbers, s a
// struct of 64-bit words) and its size. `call` takes their values from where `values` points.
struct Argument {
    const void* data;  // of a struct: its words, each as an Argument
    u64 bytes;         // of a tensor; `plain`: `data` itself is the word
};
constexpr u64 plain = ~0ull;
constexpr u32 arguments_most = 64;
extern void* values[arguments_most];

template <class... Parameters>
struct Signature {
    static_assert(sizeof...(Parameters) <= arguments_most, "that many parameters");
    static constexpr char letters[] = {
        (std::is_pointer_v<Parameters> ? std::is_const_v<std::remove_pointer_t<Parameters>> ? 'c' : 'p'
         : std::is_class_v<Parameters> ? 's' : std::is_floating_point_v<Parameters> ? 'f'
         : std::is_signed_v<Parameters> ? 'i' : 'u')..., 0};
    static constexpr u32 sizes[] = {sizeof(Parameters)..., 0};
    template <size_t... i>
    static void with(void (*kernel)(Parameters...), std::index_sequence<i...>) { kernel(*(Parameters*)values[i]...); }
};
template <class... Parameters>
Signature<Parameters...> signature(void (*)(Parameters...));
template <class... Parameters>
void call(void (*kernel)(Parameters...)) {
    Signature<Parameters...>::with(kernel, std::index_sequence_for<Parameters...>());
}
// Returns what went wrong, or null. `most`: of __launch_bounds__.
const char* launch(void (*kernel)(), const char* letters, u32 most, const Shape& how, const Argument* arguments);
void release();  // gives the threads' stacks back, until the next launch
constexpr u32 bound(u32 most = 1024, u32 = 0, u32 = 0) { return most; }
}  // namespace shim

// --- what CUDA has built in ----------------------------------------------------------------------------------------

// What the kernels declare again as `extern __shared__ u8 shared[]`. All thread-local memory of the library is what a
// block shares, static arrays too: there is one thread, of which all emulated ones are fibres.
extern "C" {
extern __shared__ __align__(4096) u8 shared[shim::shared_room];
}

#define threadIdx (shim::me->index)
#define blockIdx (shim::block->index)
#define blockDim (shim::shape.block)
#define gridDim (shim::shape.grid)

DEVICE void __syncthreads() { shim::wait(0, 0); }
DEVICE void __threadfence() {}
DEVICE void __syncwarp(u32 mask = ~0u) {
    shim::Post post = {"__syncwarp", [](shim::Post* const*, u32) {}, mask};
    shim::publish();
    shim::collective(&post);
}
namespace shim {
template <class Value>
Value shuffle(const char* name, u32 mask, Value value, u32 from) {
    static_assert(std::is_arithmetic_v<Value> && sizeof(Value) <= 8, "numbers");
    Exchange post = {{name, exchange_lanes, mask}, 0, 0, from};
    __builtin_memcpy(&post.value, &value, sizeof value);
    collective(&post);
    __builtin_memcpy(&value, &post.got, sizeof value);
    return value;
}
// Lanes that ask past their part of the warp get their own.
inline u32 within(u32 from, u32 width) { return from <= (me->lane | (width - 1)) ? from : me->lane; }
}  // namespace shim
template <class Value>
Value __shfl_sync(u32 mask, Value value, u32 from, u32 width = 32) {
    return shim::shuffle("__shfl_sync", mask, value, (shim::me->lane & ~(width - 1)) | (from & (width - 1)));
}
template <class Value>
Value __shfl_xor_sync(u32 mask, Value value, u32 with, u32 width = 32) {
    return shim::shuffle("__shfl_xor_sync", mask, value, shim::within(shim::me->lane ^ with, width));
}
template <class Value>
Value __shfl_down_sync(u32 mask, Value value, u32 by, u32 width = 32) {
    return shim::shuffle("__shfl_down_sync", mask, value, shim::within(shim::me->lane + by, width));
}
DEVICE u32 __float_as_uint(float f) {
    u32 bits;
    __builtin_memcpy(&bits, &f, 4);
    return bits;
}
DEVICE float __uint_as_float(u32 bits) {
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}
template <class Value>
Value __ldg(const Value* p) {
    return *p;
}
template <class Value>
Value atomicAdd(Value* p, std::common_type_t<Value> value) {  // the place decides the type
    const Value old = *p;
    *p = old + value;
    return old;
}
DEVICE float __fmul_rn(float a, float b) { return a * b; }  // g++ is told to contract nothing
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __frcp_rn(float a) { return 1.0f / a; }
extern "C" {
float fmaf(float, float, float) noexcept;
float roundf(float) noexcept;
float rintf(float) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float fminf(float, float) noexcept;
float fmaxf(float, float) noexcept;
}
template <class First, class Second>
constexpr std::common_type_t<First, Second> min(First a, Second b) {
    typedef std::common_type_t<First, Second> Both;
    if constexpr (std::is_same_v<Both, float>) return fminf(a, b);  // of a number and NaN the number
    else return (Both)a < (Both)b ? (Both)a : (Both)b;
}
template <class First, class Second>
constexpr std::common_type_t<First, Second> max(First a, Second b) {
    typedef std::common_type_t<First, Second> Both;
    if constexpr (std::is_same_v<Both, float>) return fmaxf(a, b);
    else return (Both)a > (Both)b ? (Both)a : (Both)b;
}

// --- the names of kernels/device.cuh (no parameter in capitals, which are the kernels' macros) ----------------------

template <int mantissa, int bias>
constexpr u32 whole(u32 n) {
    u32 e = 0;
    while ((n >> (e + 1)) != 0) e++;
    return ((bias + e) << mantissa) | ((n << (mantissa - e)) & ((1u << mantissa) - 1));
}

namespace shim {
template <int mantissa, int bias>
struct Pair {
    static constexpr int MANTISSA = mantissa, BIAS = bias;
    DEVICE u32 fma(u32 a, u32 b, u32 c) {
        const u32 high = fused<mantissa, bias>(a >> 16, b >> 16, c >> 16);
        return high << 16 | fused<mantissa, bias>(a & 0xffff, b & 0xffff, c & 0xffff);
    }
    DEVICE float low(u32 a) { return widen<mantissa, bias>(a & 0xffff); }
    DEVICE float high(u32 a) { return widen<mantissa, bias>(a >> 16); }
    DEVICE u32 pack(float l, float h) { return narrow<mantissa, bias>(h) << 16 | narrow<mantissa, bias>(l); }
    DEVICE void mma(float* d, const u32* a, u32 b0, u32 b1) {
        Matrices post = {{"mma", multiply<mantissa, bias>, ~0u}, d, a, {b0, b1}};
        collective(&post);
    }
};
}  // namespace shim
struct Half : shim::Pair<10, 15> {};
struct BFloat : shim::Pair<7, 127> {};

template <class Type>
DEVICE u32 mul2(u32 a, u32 b) {
    return Type::fma(a, b, 0x80008000u);
}

template <int bytes = 0>
DEVICE uint4 stream16(const void* p) {
    shim::check_global("stream16", (const u8*)p + bytes, 16);
    return *(const uint4*)((const u8*)p + bytes);
}
template <int bytes = 0>
DEVICE uint2 stream8(const void* p) {
    shim::check_global("stream8", (const u8*)p + bytes, 8);
    return *(const uint2*)((const u8*)p + bytes);
}
DEVICE void prefetch(const void*) {}
DEVICE void wait_for_previous() {}
DEVICE void next_may_begin() {}
DEVICE u32 shared_address(const void* p) {
    if (!shim::is_shared(p)) shim::fault("address %p is not in shared memory", p);
    return (u32)((const u8*)p - shim::memory);
}

// The bytes come only when this thread waits for them; until then their place holds poison.
DEVICE void copy16(u32 to, const void* global, bool there) {
    shim::check_global("copy16", global, 16);
    shim::copy(shim::shared_place("copy16", to, 16, 16), global, there);
}
DEVICE void copies_commit() { shim::commit(); }
template <int most>
DEVICE void copies_wait() {
    shim::land(most);
}

DEVICE void barrier_some(int id, int threads) { shim::wait(id, threads); }

DEVICE void load_matrices(u32* r, u32 row) {
    shim::Rows post = {{"load_matrices", shim::load_rows, ~0u}, r, row};
    shim::collective(&post);
}

DEVICE float fma_saturated(float a, float b, float c) {
    const float sum = fmaf(a, b, c);
    return sum > 0 ? sum < 1 ? sum : 1 : 0;
}

DEVICE u32 and_or(u32 a, u32 mask, u32 with) { return (a & mask) | with; }

// kernels/hopper.cuh for a CPU. Products, those of hopper8.cuh too, are computed as late as
// `products_wait` allows, so that registers or shared memory that are written too early spoil them; copies land at once.
// A launch gives `Boxes` as (matrix, its rows, its columns, rows of a box).
#pragma once
#include "device.cuh"
#include <deque>
#include <map>
#include <vector>


struct Boxes {
    u64 opaque[16];
};

namespace shim {
struct Barrier {
    u32 phase : 1, count : 15, pending : 16;
    int bytes;
};
static_assert(sizeof(Barrier) == 8, "as an mbarrier");
inline void settle(Barrier* b) {
    if (b->pending || b->bytes) return;
    b->phase ^= 1, b->pending = b->count;
}
inline void arrive_at(u64* barrier) {
    Barrier* b = (Barrier*)barrier;
    if (!b->pending) fault("an arrival too many at a barrier");
    publish();
    b->pending--;
    settle(b);
}
inline void landed(u64* barrier, u32 bytes) {
    Barrier* b = (Barrier*)barrier;
    b->bytes -= (int)bytes;
    settle(b);
}
inline u64* barrier_of(u64* mine, u32 rank) { return (u64*)peer(mine, rank); }
inline void box(u8* to, const Boxes* boxes, int row, int column) {
    const u8* matrix = (const u8*)boxes->opaque[0];
    const int rows = (int)boxes->opaque[1], columns = (int)boxes->opaque[2], count = (int)boxes->opaque[3];
    for (int r = 0; r < count; r++)
        for (int p = 0; p < 8; p++)
            for (int i = 0; i < 16; i++) {
                const int c = column * 2 + p * 16 + i;
                to[r * 128 + ((p ^ (r % 8)) * 16) + i] =
                    row + r < rows && c < columns * 2 ? matrix[(u64)(row + r) * columns * 2 + c] : 0;
            }
}
inline u8* box_place(u32 shared) {
    if (shared % 1024) fault("a box at %u", shared);
    return shared_place("copy_box", shared, 128, 128);
}

struct Job : Post {
    int n, kind;  // 0: 8-bit; 10, 7: mantissa of 16-bit floats
    void* d;
    const u32* a;
    u64 b;
};
struct Queue {
    std::deque<std::vector<Job>> groups;
    std::vector<Job> open;
    bool fenced = false;
};
inline std::map<Thread*, Queue> queues;
inline Queue& queue() { return queues[me]; }

inline void run_job(Post* const* lanes, u32) {
    const Job& first = *(const Job*)lanes[0];
    const u32 start = (u32)(first.b & 0x3fff) << 4;
    static u8 a[16][32], b[256][32];
    for (int lane = 0; lane < 32; lane++) {
        if (!lanes[lane]) fault("lane %d left before a product", lane);
        const Job& job = *(const Job*)lanes[lane];
        if (job.b != first.b || job.n != first.n) fault("lanes differ in a product");
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 4; i++)
                a[lane / 4 + r % 2 * 8][lane % 4 * 4 + r / 2 * 16 + i] = (u8)(job.a[r] >> 8 * i);
    }
    for (int n = 0; n < first.n; n++)
        for (int i = 0; i < 32; i++) {
            const u32 at = start + n * 128 + i;
            b[n][i] = *shared_place("product", at ^ (at >> 7 & 7) << 4, 1, 1);
        }
    for (int lane = 0; lane < 32; lane++) {
        Job& job = *(Job*)lanes[lane];
        for (int i = 0; i < first.n / 8; i++)
            for (int e = 0; e < 4; e++) {
                const u8 *row = a[lane / 4 + e / 2 * 8], *column = b[i * 8 + lane % 4 * 2 + e % 2];
                if (first.kind == 0) {
                    int& d = ((int*)job.d)[4 * i + e];
                    for (int k = 0; k < 32; k++) d += (signed char)row[k] * (signed char)column[k];
                } else {
                    float& d = ((float*)job.d)[4 * i + e];
                    for (int k = 0; k < 32; k += 2) {
                        const u32 l = row[k] | row[k + 1] << 8, r = column[k] | column[k + 1] << 8;
                        d += first.kind == 10 ? widen<10, 15>(l) * widen<10, 15>(r) : widen<7, 127>(l) * widen<7, 127>(r);
                    }
                }
            }
    }
}
inline void enqueue(int kind, int n, void* d, const u32* a, u64 b) {
    if (!queue().fenced) fault("a product without products_begin");
    Job job;
    job.name = "product", job.run = run_job, job.mask = ~0u;
    job.kind = kind, job.n = n, job.d = d, job.a = a, job.b = b;
    queue().open.push_back(job);
}
}  // namespace shim

DEVICE void barrier_init(u64* barrier, u32 count) {
    shim::Barrier* b = (shim::Barrier*)barrier;
    b->phase = 0, b->count = b->pending = count, b->bytes = 0;
}
DEVICE void barrier_init_done() {}
DEVICE void barrier_arrive(u64* barrier) { shim::arrive_at(barrier); }
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    ((shim::Barrier*)barrier)->bytes += (int)bytes;
    shim::arrive_at(barrier);
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    shim::await("a barrier's phase", [&] { return ((shim::Barrier*)barrier)->phase != parity; });
}

DEVICE void copy_box(u32 shared, const Boxes* boxes, int row, int column, u64* barrier) {
    shim::box(shim::box_place(shared), boxes, row, column);
    shim::landed(barrier, (u32)boxes->opaque[3] * 128);
}
DEVICE void prefetch_run(const void* global, u32) { shim::check_global("prefetch_run", global, 16); }
DEVICE void copy_run(u32 shared, const void* global, u32 bytes, u64* barrier) {
    shim::check_global("copy_run", global, 16);
    __builtin_memcpy(shim::shared_place("copy_run", shared, 16, bytes), global, bytes);
    shim::landed(barrier, bytes);
}
DEVICE u32 cluster_rank() { return shim::block->rank; }
DEVICE void cluster_sync() { shim::cluster_wait(); }
DEVICE float4 read_cluster(const float* mine, u32 rank) { return *(const float4*)shim::peer(mine, rank); }
template <int count>
DEVICE void registers_less() {}
template <int count>
DEVICE void registers_more() {}

DEVICE void products_begin() { shim::queue().fenced = true; }
DEVICE void products_commit() {
    shim::Queue& q = shim::queue();
    q.groups.push_back(q.open);
    q.open.clear();
    q.fenced = false;
}
template <int most>
DEVICE void products_wait() {
    shim::Queue& q = shim::queue();
    while ((int)q.groups.size() > most) {
        std::vector<shim::Job> jobs = q.groups.front();
        q.groups.pop_front();
        for (shim::Job& job : jobs) shim::collective(&job);
    }
}
DEVICE void still_used(u32&) {}
DEVICE u64 swizzled_rows(const void* place) {
    const u64 address = shared_address(place);
    if (address % 1024) shim::fault("swizzled rows at %llu", address);
    return (address & 0x3ffff) >> 4;
}
template <class Type, int n>
struct Product {
    DEVICE void add(float* d, const u32* a, u64 b) { shim::enqueue(Type::MANTISSA, n, d, a, b); }
};

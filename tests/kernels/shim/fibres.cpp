// How emulated threads run. Every CUDA thread is a fibre. One runs until it meets a barrier or an instruction of its
// whole warp, so what it reads too early is really not there yet; memory that nobody wrote holds 0xff bytes, NaN in
// every float type. A deadlock is a fault, not a wait.
#include "runtime.h"

#include <csetjmp>
#include <cstring>
#include <deque>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace shim {
constexpr u32 barriers = 16, stack_guard = 1 << 18;
constexpr u32 shared_most = 227 << 10;  // of dynamic shared memory, on Hopper; others have less

enum State { READY, AT_WARP, AT_BARRIER, AT_CLUSTER, POLLING, DONE };
struct Copy {  // one on its way
    u8* to;
    u8 bytes[16];
    u32 group;
};
struct Fibre : Thread {
    State state;
    Post* post;
    u32 barrier;
    const char* polls;
    std::vector<Copy> copies;
    u32 groups;  // of copies, committed
    std::vector<u32> unpublished;  // pieces of 16 bytes in shared memory that landed since it last met others
    u8* stack = nullptr;
    bool begun = false;
    ucontext_t first;
    jmp_buf resume;
};
struct Block : Group {
    u32 live, arrived[barriers], needed[barriers];
    std::vector<Fibre*> fibres;
    std::vector<u16> fresh;  // for each 16 bytes of shared memory, whose (lane + 1) unpublished copy is there
    std::vector<u8> image;  // its shared memory while another block of the cluster runs
};

Shape shape;
Thread* me;
Group* block;
void (*body)();
static std::deque<Fibre> pool;
static std::vector<Block> cluster;
static u64 progress;  // counts what can bring others forward
static jmp_buf scheduler;

static Fibre& self() { return *(Fibre*)me; }
static Block& here() { return *(Block*)block; }

void abandon() {
    for (Fibre& f : pool) f.begun = false;
}
bool beyond_stack(const u8* at) { return me && at < self().stack && at >= self().stack - stack_guard; }
u32 unpublished_by(const void* p) { return here().fresh[((const u8*)p - memory) / 16]; }

// --- fibres --------------------------------------------------------------------------------------------------------

static void leave(State state) {
    self().state = state;
    if (!_setjmp(self().resume)) _longjmp(scheduler, 1);
}
static void enter(Fibre* fibre) {
    me = fibre;
    if (!_setjmp(scheduler)) {
        if (fibre->begun) _longjmp(fibre->resume, 1);
        fibre->begun = true;
        setcontext(&fibre->first);
    }
    me = nullptr;
}
static void entry() {
    for (;;) {  // a fibre serves one block after another
        body();
        leave(DONE);
    }
}

void collective(Post* post) {
    if (!(post->mask >> me->lane & 1)) fault("%s: lane %u is not in its own mask", post->name, me->lane);
    self().post = post;
    leave(AT_WARP);
}
void publish() {
    for (u32 piece : self().unpublished) here().fresh[piece] = 0;
    self().unpublished.clear();
}
void arrive(u32 id, u32 count) {
    publish();
    Block& b = here();
    if (id >= barriers) fault("barrier %u: there are %u", id, barriers);
    if (b.arrived[id] && b.needed[id] != count)
        fault("barrier %u of %u threads, and of %u", id, b.needed[id], count);
    b.needed[id] = count;
    b.arrived[id]++;
}
void wait(u32 id, u32 count) {
    arrive(id, count);
    self().barrier = id;
    leave(AT_BARRIER);
}
void poll(const char* what) {
    self().polls = what;
    leave(POLLING);
}
void polled() { progress++; }
void cluster_wait() {
    publish();
    leave(AT_CLUSTER);
}
u8* peer(const void* mine, u32 rank) {
    if (rank >= cluster.size()) fault("block %u of a cluster of %zu", rank, cluster.size());
    if (!is_shared(mine)) fault("address %p is not in shared memory", mine);
    return rank == block->rank ? (u8*)mine : cluster[rank].image.data() + ((u8*)mine - memory);
}

bool is_shared(const void* p) { return (u8*)p >= memory && (u8*)p < memory_end; }
u8* shared_place(const char* name, u32 address, u32 alignment, u32 bytes) {
    if (address % alignment) fault("%s: shared address %u is not aligned to %u bytes", name, address, alignment);
    if (memory + address + bytes > memory_end) fault("%s: shared address %u is out of bounds", name, address);
    return memory + address;
}
void check_global(const char* name, const void* p, u32 alignment) {
    if (is_shared(p)) fault("%s: a shared address where a global one belongs", name);
    if ((u64)p % alignment) fault("%s: address %p is not aligned to %u bytes", name, p, alignment);
}
void copy(u8* to, const void* from, bool there) {
    Copy one = {to, {}, self().groups};
    if (there) memcpy(one.bytes, from, 16);
    memset(to, poison, 16);
    self().copies.push_back(one);
}
void commit() { self().groups++; }
void land(u32 most) {
    std::vector<Copy>& copies = self().copies;
    size_t kept = 0;
    for (const Copy& one : copies) {
        if (one.group + most >= self().groups) {
            copies[kept++] = one;
            continue;
        }
        const u32 piece = (one.to - memory) / 16;
        memcpy(one.to, one.bytes, 16);
        here().fresh[piece] = me->lane + 1;
        self().unpublished.push_back(piece);
    }
    copies.resize(kept);
}

// --- the scheduler -------------------------------------------------------------------------------------------------

// Runs an instruction for which all lanes of its mask are there, if there is one.
static bool release_warp(Fibre* const* warp, u32 lanes) {
    for (u32 i = 0; i < lanes; i++) {
        if (warp[i]->state != AT_WARP) continue;
        const Post one = *warp[i]->post;
        Post* posts[32] = {};
        bool all = true;
        for (u32 j = 0; all && j < lanes; j++) {
            if (!(one.mask >> j & 1) || warp[j]->state == DONE) continue;
            posts[j] = warp[j]->post;
            all = warp[j]->state == AT_WARP && posts[j]->mask == one.mask;
            if (all && posts[j]->run != one.run)
                fault("lanes %u and %u of a warp stand at different instructions: %s and %s", i, j, one.name,
                      posts[j]->name);
        }
        if (!all) continue;
        one.run(posts, one.mask);
        for (u32 j = 0; j < lanes; j++)
            if (posts[j]) warp[j]->state = READY;
        progress++;
        return true;
    }
    return false;
}
static void release_barriers() {
    Block& b = here();
    for (u32 id = 0; id < barriers; id++) {
        if (!b.arrived[id] || b.arrived[id] < (b.needed[id] ? b.needed[id] : b.live)) continue;
        for (Fibre* f : b.fibres)
            if (f->state == AT_BARRIER && f->barrier == id) f->state = READY;
        b.arrived[id] = 0;
        progress++;
    }
}
// Every thread as far as it gets without other blocks. A warp goes on until it waits for other warps.
static void run_block() {
    Block& b = here();
    const u32 threads = b.fibres.size(), warps = (threads + 31) / 32;
    for (u64 before = progress - 1; before != progress && b.live;) {
        before = progress;
        for (u32 w = 0; w < warps; w++) {
            const u32 begin = 32 * (shape.falling ? warps - 1 - w : w);
            const u32 lanes = threads - begin < 32 ? threads - begin : 32;
            Fibre* const* warp = &b.fibres[begin];
            do
                for (u32 i = 0; i < lanes; i++) {
                    Fibre* f = warp[shape.falling ? lanes - 1 - i : i];
                    if (f->state != READY && f->state != POLLING) continue;
                    progress += f->state == READY;
                    enter(f);
                    b.live -= f->state == DONE;
                }
            while (release_warp(warp, lanes));
        }
        release_barriers();
    }
}
[[noreturn]] static void stuck() {
    for (Block& b : cluster) {
        if (!b.live) continue;
        u32 at[DONE + 1] = {};
        const char* name = nullptr;
        for (const Fibre* f : b.fibres) {
            at[f->state]++;
            if (f->state == AT_WARP) name = f->post->name;
            if (f->state == POLLING) name = f->polls;
        }
        block = &b;
        fault("deadlock: of %zu threads %u wait at a barrier, %u for lanes of their warp, %u for their cluster, "
              "%u for a condition, %u have left%s%s",
              b.fibres.size(), at[AT_BARRIER], at[AT_WARP], at[AT_CLUSTER], at[POLLING], at[DONE],
              name ? "; one waits at: " : "", name ? name : "");
    }
    fault("deadlock");
}

// --- blocks --------------------------------------------------------------------------------------------------------

// Dynamic shared memory past what the launch asked for: the rest of the page is watched, no other can be touched.
static u8* bounds() { return shared + (shape.shared_bytes + page - 1) / page * page; }
static void clear_shared() {
    memset(memory, poison, bounds() - memory);
    memset(shared + shared_room, poison, memory_end - (shared + shared_room));
}
static void check_shared() {
    for (u8* p = shared + shape.shared_bytes; p < bounds(); p++)
        if (*p != poison)
            fault("something was written %zd bytes past the %u bytes of dynamic shared memory",
                  p - shared - shape.shared_bytes, shape.shared_bytes);
}
static void swap_shared(u8* image, bool in) {
    if (cluster.size() == 1) return;
    auto part = [&](u8* from, u8* to) {
        u8* kept = image + (from - memory);
        in ? memcpy(from, kept, to - from) : memcpy(kept, from, to - from);
    };
    part(memory, bounds());
    part(shared + shared_room, memory_end);
}

void release() {
    for (Fibre& f : pool) {
        if (f.stack) munmap(f.stack - stack_guard, stack_guard + stack_bytes);
        f.stack = nullptr, f.begun = false;
    }
}
static Fibre* fibre(u32 number) {
    while (pool.size() <= number) pool.emplace_back();
    Fibre* f = &pool[number];
    if (!f->stack) {
        constexpr int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        u8* map = (u8*)mmap(nullptr, stack_guard + stack_bytes, PROT_NONE, how, -1, 0);
        if (map == MAP_FAILED || mprotect(map + stack_guard, stack_bytes, PROT_READ | PROT_WRITE))
            fault("no memory for the stacks of %u threads", number);
        f->stack = map + stack_guard;
    }
    if (!f->begun) {
        getcontext(&f->first);
        f->first.uc_stack.ss_sp = f->stack;
        f->first.uc_stack.ss_size = stack_bytes;
        makecontext(&f->first, entry, 0);
    }
    return f;
}
static void place_cluster(dim3 origin) {
    const dim3 c = shape.cluster, b = shape.block;
    const u32 threads = b.x * b.y * b.z;
    for (u32 rank = 0; rank < cluster.size(); rank++) {
        Block& one = cluster[rank];
        one.index = dim3(origin.x + rank % c.x, origin.y + rank / c.x % c.y, origin.z + rank / (c.x * c.y));
        one.rank = rank;
        one.live = threads;
        memset(one.arrived, 0, sizeof one.arrived);
        one.fibres.resize(threads);
        one.fresh.assign((memory_end - memory) / 16 + 1, 0);
        if (cluster.size() > 1) one.image.assign(memory_end - memory, poison);
        for (u32 i = 0; i < threads; i++) {
            Fibre* f = one.fibres[i] = fibre(rank * threads + i);
            f->state = READY;
            f->index = dim3(i % b.x, i / b.x % b.y, i / (b.x * b.y));
            f->lane = i % 32;
            f->copies.clear();
            f->unpublished.clear();
            f->groups = 0;
        }
    }
}
static void run_cluster() {
    for (u64 before = progress - 1;;) {
        u32 live = 0, waiting = 0;
        for (u32 i = 0; i < cluster.size(); i++) {
            Block& b = cluster[shape.falling ? cluster.size() - 1 - i : i];
            block = &b;
            swap_shared(b.image.data(), true);
            run_block();
            check_shared();
            swap_shared(b.image.data(), false);
            live += b.live;
            for (const Fibre* f : b.fibres) waiting += f->state == AT_CLUSTER;
        }
        if (!live) return;
        if (waiting == live) {
            for (Block& b : cluster)
                for (Fibre* f : b.fibres)
                    if (f->state == AT_CLUSTER) f->state = READY;
        } else if (before == progress) {
            stuck();
        }
        before = progress;
    }
}
void run_grid(u32 most) {
    const dim3 g = shape.grid, c = shape.cluster, b = shape.block;
    const u64 threads = (u64)b.x * b.y * b.z;
    if (!threads || threads > 1024) fault("a block of %llu threads: 1 to 1024 can be had", threads);
    if (threads > most) fault("a block of %llu threads: __launch_bounds__ says %u", threads, most);
    if (!c.x || !c.y || !c.z || g.x % c.x || g.y % c.y || g.z % c.z || c.x * c.y * c.z > 16)
        fault("a grid of %u x %u x %u blocks in clusters of %u x %u x %u", g.x, g.y, g.z, c.x, c.y, c.z);
    if (shape.shared_bytes > shared_most)
        fault("%u bytes of dynamic shared memory: %u can be had", shape.shared_bytes, shared_most);
    if (mprotect(bounds(), shared + shared_room - bounds(), PROT_NONE)) fault("mprotect failed");
    cluster.resize(c.x * c.y * c.z);
    const u64 x = g.x / c.x, y = g.y / c.y, count = x * y * (g.z / c.z);
    for (u64 n = 0; n < count; n++) {
        const u64 i = shape.falling ? count - 1 - n : n;
        clear_shared();
        place_cluster(dim3(i % x * c.x, i / x % y * c.y, i / (x * y) * c.z));
        run_cluster();
    }
}
}  // namespace shim

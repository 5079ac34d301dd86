// A launch from outside: arguments go to memory whose end nobody can cross, faults come back as messages.
#include "runtime.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <link.h>
#include <sys/mman.h>
#include <vector>

extern "C" {
thread_local u8 shared[shim::shared_room];
}

namespace shim {
constexpr u64 guard_bytes = 1 << 20;

struct Buffer {  // an argument's copy, which ends where memory that nobody may touch begins
    const void* from;
    u64 bytes, mapped;
    u8 *map, *begin, *data, *end;  // begin .. end can be touched, but only what is at `data` may be
    u32 argument;
    bool back;
};

u8 *memory, *memory_end;
void* values[arguments_most];
static std::vector<u64> words[arguments_most];  // of what is not simply a number
static std::vector<Buffer> buffers;
static sigjmp_buf escape;
static char message[600];

void fault(const char* format, ...) {
    va_list rest;
    va_start(rest, format);
    size_t n = vsnprintf(message, sizeof message, format, rest);
    va_end(rest);
    auto where = [&](const char* what, const dim3& i) {
        if (n < sizeof message) n += snprintf(message + n, sizeof message - n, "%s (%u, %u, %u)", what, i.x, i.y, i.z);
    };
    if (block) where("; block", block->index);
    if (me) where(", thread", me->index);
    siglongjmp(escape, 1);
}

static u8* guarded(const void* from, u64 bytes, u32 argument, bool back) {
    for (Buffer& b : buffers)
        if (b.from == from && b.bytes == bytes) {  // the same tensor twice
            b.back |= back;
            return b.data;
        }
    const u64 room = (bytes + 15) / 16 * 16, inner = (room + page - 1) / page * page, mapped = inner + 2 * guard_bytes;
    void* map = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) fault("argument %u: no memory for its %llu bytes", argument, bytes);
    u8 *begin = (u8*)map + guard_bytes, *end = begin + inner, *data = end - room;
    buffers.push_back({from, bytes, mapped, (u8*)map, begin, data, end, argument, back});
    if (inner && mprotect(begin, inner, PROT_READ | PROT_WRITE)) fault("argument %u: mprotect failed", argument);
    memset(begin, poison, inner);
    memcpy(data, from, bytes);
    return data;
}
// What kernels may write goes back to its place, unless something was written beside it.
static void give_back() {
    for (const Buffer& b : buffers) {
        for (const u8* p = b.begin; p < b.data; p++)
            if (*p != poison) fault("argument %u: something was written %zd bytes before it", b.argument, b.data - p);
        for (const u8* p = b.data + b.bytes; p < b.end; p++)
            if (*p != poison)
                fault("argument %u: something was written %zd bytes past its end", b.argument, p - (b.data + b.bytes));
    }
    for (const Buffer& b : buffers)
        if (b.back) memcpy((void*)b.from, b.data, b.bytes);
}

static void on_signal(int number, siginfo_t* info, void*) {
    u8* at = (u8*)info->si_addr;
    if (number == SIGFPE) fault("a whole number is divided by zero");
    for (const Buffer& b : buffers) {
        if (at >= b.end && at < b.map + b.mapped)
            fault("argument %u: access %zd bytes past its end", b.argument, at - (b.data + b.bytes));
        if (at >= b.map && at < b.begin) fault("argument %u: access %zd bytes before it", b.argument, b.data - at);
    }
    if (at >= shared && at < shared + shared_room)
        fault("access %zd bytes past the %u bytes of dynamic shared memory", at - shared - shape.shared_bytes,
              shape.shared_bytes);
    if (beyond_stack(at)) fault("a thread uses more than %u bytes of stack", stack_bytes);
    fault("access to address %p, which belongs to no argument", at);
}
static int find_memory(dl_phdr_info* info, size_t, void*) {
    u8* from = (u8*)info->dlpi_tls_data;
    for (int i = 0; from && i < info->dlpi_phnum; i++) {
        const u64 size = info->dlpi_phdr[i].p_memsz;
        if (info->dlpi_phdr[i].p_type == PT_TLS && from <= shared && shared < from + size)
            memory = from, memory_end = from + size;
    }
    return 0;
}
// A word of an argument: a number, or where the copy of a tensor lies.
static u64 word(const Argument& a, u32 argument, bool back) {
    return a.bytes == plain ? (u64)a.data : (u64)guarded(a.data, a.bytes, argument, back);
}
const char* launch(void (*kernel)(), const char* letters, u32 most, const Shape& how, const Argument* arguments) {
    static char signal_stack[1 << 16];
    constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3], ours = {};
    stack_t stack_before, stack = {};
    shape = how;
    body = kernel;
    block = nullptr;
    me = nullptr;
    message[0] = 0;
    shared[0] = 0;  // only from its first use has this thread its copy, which find_memory looks for
    dl_iterate_phdr(find_memory, nullptr);
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &stack_before);
    ours.sa_sigaction = on_signal;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; i++) sigaction(signals[i], &ours, &before[i]);
    if (!sigsetjmp(escape, 1)) {
        for (u32 i = 0; letters[i]; i++) {
            const Argument& a = arguments[i];
            words[i].clear();
            if (letters[i] == 'p' || letters[i] == 'c') words[i].push_back(word(a, i, letters[i] == 'p'));
            for (u64 w = 0; letters[i] == 's' && w < a.bytes / 8; w++)
                words[i].push_back(word(((const Argument*)a.data)[w], i, false));
            values[i] = words[i].empty() ? (void*)a.data : words[i].data();
        }
        run_grid(most);
        block = nullptr;
        give_back();
    } else {
        abandon();
    }
    for (int i = 0; i < 3; i++) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
    mprotect(shared, shared_room, PROT_READ | PROT_WRITE);
    for (const Buffer& b : buffers) munmap(b.map, b.mapped);
    buffers.clear();
    return message[0] ? message : nullptr;
}
}  // namespace shim

// --- what g++ calls where -fsanitize finds something; a site begins with its place in the source ---------------------

struct Site {
    const char* file;
    u32 line, column;
};
extern "C" {
void __ubsan_handle_type_mismatch_v1(const Site* s, void* at) {
    shim::fault("%s:%u: access to address %p, which is not aligned", s->file, s->line, at);
}
void __ubsan_handle_out_of_bounds(const Site* s, u64 index) {
    shim::fault("%s:%u: index %lld is out of bounds", s->file, s->line, (long long)index);
}
void __ubsan_handle_shift_out_of_bounds(const Site* s, u64, u64 by) {
    shim::fault("%s:%u: shift by %lld bits", s->file, s->line, (long long)by);
}
}

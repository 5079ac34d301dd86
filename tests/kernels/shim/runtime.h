// What the parts of the emulation know of each other.
#pragma once
#include "device.cuh"

namespace shim {
constexpr u32 poison = 0xff, page = 4096, stack_bytes = 1 << 16;

extern u8* memory_end;  // of `memory`

// fibres.cpp
extern void (*body)();    // the kernel
void run_grid(u32 most);  // of `shape`; a block may have so many threads
void abandon();           // after a fault, which leaves fibres in the middle of the kernel
bool beyond_stack(const u8* at);
u32 unpublished_by(const void* p);  // 1 + the lane whose copy has landed there and that has met no other since; or 0
}  // namespace shim

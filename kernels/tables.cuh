// The numbers of the tables of compress/tables.py, in the order of its NAMES: NUMBERS says which is meant. Known when a
// kernel is compiled, they are in its instructions.
#pragma once

#ifndef NUMBERS
#define NUMBERS 0
#endif

// What a code of 4 bits stands for.
DEVICE float number_of(int code) {
#if NUMBERS == 0  // nf4
    constexpr float numbers[16] = {
        -0x1p+0f, -0x1.647362p-1f, -0x1.0cd66p-1f, -0x1.94654p-2f,
        -0x1.23449ap-2f, -0x1.7a6a7ep-3f, -0x1.74f0e2p-4f, 0.0f,
        0x1.45f5fep-4f, 0x1.4995c6p-3f, 0x1.f809bap-3f, 0x1.5a0674p-2f,
        0x1.c3497p-2f, 0x1.200f56p-1f, 0x1.722766p-1f, 0x1p+0f,
    };
#elif NUMBERS == 1  // fp4-e2m1
    constexpr float numbers[16] = {
        0.0f, 0x1.555556p-4f, 0x1.555556p-3f, 0x1p-2f,
        0x1.555556p-2f, 0x1p-1f, 0x1.555556p-1f, 0x1p+0f,
        0.0f, -0x1.555556p-4f, -0x1.555556p-3f, -0x1p-2f,
        -0x1.555556p-2f, -0x1p-1f, -0x1.555556p-1f, -0x1p+0f,
    };
#elif NUMBERS == 2  // fp4-e1m2
    constexpr float numbers[16] = {
        0.0f, 0x1.24924ap-3f, 0x1.24924ap-2f, 0x1.b6db6ep-2f,
        0x1.24924ap-1f, 0x1.6db6dcp-1f, 0x1.b6db6ep-1f, 0x1p+0f,
        0.0f, -0x1.24924ap-3f, -0x1.24924ap-2f, -0x1.b6db6ep-2f,
        -0x1.24924ap-1f, -0x1.6db6dcp-1f, -0x1.b6db6ep-1f, -0x1p+0f,
    };
#elif NUMBERS == 3  // fp4-e3m0
    constexpr float numbers[16] = {
        0.0f, 0x1p-6f, 0x1p-5f, 0x1p-4f,
        0x1p-3f, 0x1p-2f, 0x1p-1f, 0x1p+0f,
        0.0f, -0x1p-6f, -0x1p-5f, -0x1p-4f,
        -0x1p-3f, -0x1p-2f, -0x1p-1f, -0x1p+0f,
    };
#elif NUMBERS == 4  // fp4-bnb
    constexpr float numbers[16] = {
        0.0f, 0x1.555556p-8f, 0x1.555556p-1f, 0x1p+0f,
        0x1.555556p-2f, 0x1p-1f, 0x1.555556p-3f, 0x1p-2f,
        0.0f, -0x1.555556p-8f, -0x1.555556p-1f, -0x1p+0f,
        -0x1.555556p-2f, -0x1p-1f, -0x1.555556p-3f, -0x1p-2f,
    };
#endif
    // Bit by bit: of `code == i ? numbers[i] : found` the compiler makes branches that read numbers[code] from local memory.
    float left[8];
#pragma unroll
    for (int i = 0; i < 8; i++) left[i] = code & 8 ? numbers[i + 8] : numbers[i];
#pragma unroll
    for (int i = 0; i < 4; i++) left[i] = code & 4 ? left[i + 4] : left[i];
#pragma unroll
    for (int i = 0; i < 2; i++) left[i] = code & 2 ? left[i + 2] : left[i];
    return code & 1 ? left[1] : left[0];
}

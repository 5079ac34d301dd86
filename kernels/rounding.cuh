// Rounding float32 numbers to the type in which something is stored: Half, BFloat, or Single, which is float32 itself.
#pragma once
#include "device.cuh"

struct Single {
    DEVICE float round(float x) { return x; }
};
template <class S>
struct Rounded {
    DEVICE float round(float x) { return S::low(S::pack(x, 0.0f)); }
};
template <>
struct Rounded<Single> : Single {};

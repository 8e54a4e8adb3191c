// LayerNorm over the last dimension of channels-last maps, in plain pointers: float32 inside, any dtype in and out.
#pragma once

#include <cstdint>

#include "scan.h"

namespace vmamba {

struct LayerNorm {
    const void* x = nullptr;        // (rows, channels), contiguous
    const void* branch = nullptr;   // added to x first, in y_dtype; or null
    const float* weight = nullptr;  // (channels)
    const float* bias = nullptr;
    int64_t rows = 0;
    int64_t channels = 0;
    float eps = 0.0f;
    Scalar x_dtype = Scalar::f32;
    Scalar y_dtype = Scalar::f32;
};

}  // namespace vmamba

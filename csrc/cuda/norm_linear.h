// A linear layer without bias behind a LayerNorm of few channels, in one pass; queued on the current stream.
#pragma once

#include <cstdint>

#include "../scan.h"

namespace vmamba::cuda {

constexpr int64_t kMostNormLinearWeights = 48 * 1024;  // which are in shared memory

inline bool serves_norm_linear(int64_t channels, int64_t out_channels) {
    return (channels == 64 || channels == 96 || channels == 128) && out_channels > 0 && out_channels % 32 == 0 &&
           channels * out_channels <= kMostNormLinearWeights;
}

struct NormLinear {
    const void* x = nullptr;             // (rows, channels)
    const float* norm_weight = nullptr;  // (channels), as norm_bias
    const float* norm_bias = nullptr;
    float eps = 0.0f;
    const void* weight = nullptr;  // (out_channels, channels)
    void* y = nullptr;             // (rows, out_channels)
    int64_t rows = 0;
    int channels = 0;
    int out_channels = 0;
    Scalar x_dtype = Scalar::f32;  // float32 or dtype
    Scalar dtype = Scalar::bf16;   // of weight and y: 16 bits
};

void norm_linear(const NormLinear& layer, int device);

}  // namespace vmamba::cuda

// LayerNorm on the GPU, forward and backward; queued on the current stream, deterministic.
#pragma once

#include "../layer_norm.h"

namespace vmamba::cuda {

// Rows this wide are served: the channels lie in the registers of one warp, in packs of four.
constexpr int64_t kMaxNormChannels = 1536;
inline bool serves_layer_norm(int64_t channels) {
    return channels > 0 && channels % 4 == 0 && channels <= kMaxNormChannels;
}

// y in y_dtype; mean and 1 / standard deviation of every row, or null where no gradient will be asked for. sum: x +
// branch in x_dtype, where there is a branch.
void layer_norm_forward(const LayerNorm& norm, void* y, void* sum, float* mean, float* rstd, int device);

int64_t layer_norm_backward_workspace(const LayerNorm& norm, int device);
// What the backward reads and writes. Where there was a branch, x is the sum; dsum, the gradient that reaches the sum
// past the norm, adds to dx, and dbranch is dx in y_dtype.
struct LayerNormGradients {
    const void* dy = nullptr;    // y_dtype
    const void* dsum = nullptr;  // x_dtype, or null
    const float* mean = nullptr;
    const float* rstd = nullptr;
    void* dx = nullptr;       // x_dtype
    void* dbranch = nullptr;  // y_dtype, or null
    float* dweight = nullptr;
    float* dbias = nullptr;
};
void layer_norm_backward(const LayerNorm& norm, const LayerNormGradients& gradients, void* workspace, int device);

}  // namespace vmamba::cuda

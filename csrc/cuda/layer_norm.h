// LayerNorm on the GPU, forward and backward; queued on the current stream, deterministic.
#pragma once

#include "../layer_norm.h"

namespace vmamba::cuda {

// Rows this wide are served: the channels lie in the registers of one warp, in packs of four.
constexpr int64_t kMaxNormChannels = 1536;
inline bool serves_layer_norm(int64_t channels) { return channels % 4 == 0 && channels <= kMaxNormChannels; }

// y in y_dtype; mean and 1 / standard deviation of every row, or null where no gradient will be asked for.
void layer_norm_forward(const LayerNorm& norm, void* y, float* mean, float* rstd, int device);

int64_t layer_norm_backward_workspace(const LayerNorm& norm, int device);
// dy in y_dtype, dx in x_dtype.
void layer_norm_backward(const LayerNorm& norm, const void* dy, const float* mean, const float* rstd, void* dx,
                         float* dweight, float* dbias, void* workspace, int device);

}  // namespace vmamba::cuda

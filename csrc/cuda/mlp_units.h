// What mlp.cu and the units with the kernels, one for each dtype, say to each other.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "mlp.h"

namespace vmamba::cuda {

// Blocks that take turns through tiles of rows, one to a multiprocessor.
inline int blocks_for(int64_t rows, int tile_rows, int device) {
    const int64_t most = device_attribute(cudaDevAttrMultiProcessorCount, device);
    return static_cast<int>(std::min(ceil_div(rows, tile_rows), most));
}

constexpr int kMlpBackwardWarps = 12;  // of 16 rows, to a block

template <typename T>
void mlp_forward_as(const MlpForward& mlp, int device, cudaStream_t stream);
template <typename T>
void mlp_residual_as(const MlpResidual& mlp, int device, cudaStream_t stream);

// partial: (blocks * warps, hidden).
template <typename T>
void mlp_backward_as(const MlpBackward& mlp, float* partial, int device, cudaStream_t stream);

}  // namespace vmamba::cuda

// Depthwise convolution on the GPU, forward and backward; queued on the current stream, deterministic.
#pragma once

#include "../depthwise_conv.h"

namespace vmamba::cuda {

constexpr int kMostTaps = 64;
constexpr int64_t kMostColumnStride = 1 << 28;  // elements from a column to the next, of any map

// y: (batch, directions, out_height, out_width, channels) in conv.dtype.
void depthwise_conv_forward(const DepthwiseConv& conv, void* y, int device);

// A gradient shaped like the result; its channels are contiguous.
struct ConvGrad {
    const void* data = nullptr;
    int64_t image_stride = 0, direction_stride = 0, row_stride = 0, column_stride = 0;
};

int64_t depthwise_conv_backward_workspace(const DepthwiseConv& conv, int device);
// dz: contiguous, shaped like the result, where there is a SiLU: what arrives before it. dx is contiguous; dweight and
// dbias (or null) have the dtype of the weight.
void depthwise_conv_backward(const DepthwiseConv& conv, const ConvGrad& dy, void* dz, void* dx, void* dweight,
                             void* dbias, void* workspace, int device);

}  // namespace vmamba::cuda

// A depthwise convolution of channels-last maps, in plain pointers, sizes and strides.
#pragma once

#include <cstdint>

#include "scan.h"

namespace vmamba {

// The second of two directions convolves the map turned by 180 degrees, with weights of its own, and turns the result
// back: its taps lie in mirrored order, and what pads the map above and at the left is what pads it below and at the
// right for the first.
struct DepthwiseConv {
    const void* x = nullptr;  // (batch, height, width, channels); strides count elements, channels are contiguous
    int64_t image_stride = 0, row_stride = 0, column_stride = 0;
    int64_t batch = 0, height = 0, width = 0, channels = 0;
    int64_t out_height = 0, out_width = 0;  // of the result (batch, directions, out_height, out_width, channels)
    Scalar dtype = Scalar::f32;

    const void* weight = nullptr;  // (directions, channels, kernel_height, kernel_width)
    const void* bias = nullptr;    // (directions, channels), or null
    Scalar weight_dtype = Scalar::f32;
    int directions = 1;
    int kernel_height = 1, kernel_width = 1;
    int stride_height = 1, stride_width = 1;
    int dilation_height = 1, dilation_width = 1;
    int top = 0, left = 0;   // padding
    bool replicate = false;  // pads with the border's values, not with zeros
    bool residual = false;   // adds x to the convolution
    bool silu = false;       // of all that

    constexpr int taps() const { return kernel_height * kernel_width; }
};

}  // namespace vmamba

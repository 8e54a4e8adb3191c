// What the host code and the kernels of the depthwise convolution say to each other, one compilation unit per dtype.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../scan.h"
#include "plan.h"

namespace vmamba::cuda {

// Maps of one or two directions; strides count elements, channels are contiguous.
struct ConvMap {
    void* data = nullptr;
    int64_t image_stride = 0, direction_stride = 0, row_stride = 0;
    uint32_t column_stride = 0;  // less than kMostColumnStride
    int height = 0, width = 0;
};

struct Filter {
    const void* weight = nullptr;  // (directions, channels, taps)
    const void* bias = nullptr;
    Scalar dtype = Scalar::f32;
    int channels = 0, directions = 1;
    int height = 1, width = 1;
    int stride_height = 1, stride_width = 1;
    int dilation_height = 1, dilation_width = 1;
    int top[2] = {0, 0}, left[2] = {0, 0};  // padding, per direction
    bool mirrored[2] = {false, true};       // whether the weights lie from the last tap to the first
    int centre = -1;                        // the tap that 1 is added to, so that the map itself is added; or none
    bool replicate = false;

    constexpr int taps() const { return height * width; }

    // For unit strides, the gradient of the map is a convolution too: of the result's, with this.
    Filter transposed() const {
        Filter other = *this;
        other.bias = nullptr;
        for (int k = 0; k < 2; ++k) {
            other.top[k] = (height - 1) * dilation_height - top[k];
            other.left[k] = (width - 1) * dilation_width - left[k];
            other.mirrored[k] = !mirrored[k];
        }
        if (centre >= 0) other.centre = taps() - 1 - centre;
        return other;
    }
};

// How threads share the work. A block is `lanes` packs of channels times `groups` strips; a strip is some neighbouring
// columns of a row. Blocks are counted by tile (so many strips), direction, and chunk (so many packs), which is last.
struct ConvLayout {
    int lanes = 1, groups = 1, chunks = 1;
    Divisor row_strips, rows;
    int64_t strips = 0, tiles = 0;

    static constexpr int kThreads = 256;
    static constexpr int kMostChannels = 32;  // of a block

    ConvLayout(const ConvMap& map, int64_t batch, int channels, int pack, int columns) {
        const int packs = (channels + pack - 1) / pack, most = kMostChannels / pack;
        chunks = (packs + most - 1) / most;
        lanes = (packs + chunks - 1) / chunks;
        groups = kThreads / lanes;
        const int per_row = (map.width + columns - 1) / columns;
        row_strips = Divisor(static_cast<uint32_t>(per_row));
        rows = Divisor(static_cast<uint32_t>(map.height));
        strips = batch * map.height * per_row;
        tiles = (strips + groups - 1) / groups;
    }
};

// target = the convolution of source, per direction, or where `sums`, summed over the source's directions.
struct ConvForward {
    ConvMap source, target;
    Filter filter;
    int64_t batch = 0;
    bool sums = false, silu = false;
};

// The gradients of the filter, in `blocks` parts for each direction and chunk: rows of (taps and bias, channels).
struct ConvBackward {
    ConvMap x, dy, dz;  // dz is written where there is a SiLU, else it is dy
    Filter filter;
    int64_t batch = 0;
    int64_t blocks = 0;
    float* partial = nullptr;
    bool silu = false;
};

// The gradient of the map where it is not a convolution: strides, or borders that were replicated.
struct ConvGather {
    ConvMap dz, dx;
    Filter filter;
    int64_t batch = 0;
};

// `packed`: whether four neighbouring channels can be loaded at once, everywhere.
template <typename T>
void conv_forward(const ConvForward& task, bool packed, cudaStream_t stream);
template <typename T>
void conv_backward(const ConvBackward& task, bool packed, cudaStream_t stream);
template <typename T>
void conv_gather(const ConvGather& task, bool packed, cudaStream_t stream);

}  // namespace vmamba::cuda

// The first layers of a stem, gelu(layer_norm(conv(image))), in one pass; queued on the current stream.
#pragma once

#include <cstdint>

#include "../scan.h"

namespace vmamba::cuda {

constexpr int kStemKernel = 3;  // rows, columns and channels of a patch

inline bool serves_conv_norm_gelu(int64_t channels) { return channels == 32 || channels == 48 || channels == 64; }

struct ConvNormGelu {
    const void* image = nullptr;  // (batch, 3, height, width), of any strides
    int64_t image_stride = 0;
    int channel_stride = 0, row_stride = 0, column_stride = 0;
    int64_t batch = 0;
    int height = 0, width = 0;
    int stride = 1;                 // of the patches; the image is padded by 1
    const float* weight = nullptr;  // (channels, 3, 3, 3), of any strides
    int64_t weight_strides[4] = {};
    const float* bias = nullptr;  // (channels), as norm_weight and norm_bias
    const float* norm_weight = nullptr;
    const float* norm_bias = nullptr;
    float eps = 0.0f;
    void* y = nullptr;  // (batch, out_height, out_width, channels)
    int channels = 0;
    Scalar image_dtype = Scalar::f32;  // or y_dtype
    Scalar y_dtype = Scalar::bf16;     // 16 bits

    int out_height() const { return (height - 1) / stride + 1; }
    int out_width() const { return (width - 1) / stride + 1; }
    int64_t positions() const { return batch * out_height() * out_width(); }
};

void conv_norm_gelu(const ConvNormGelu& stem, int device);

}  // namespace vmamba::cuda

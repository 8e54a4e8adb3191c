// A warp has 16 positions: a tensor-core product of their patches, 27 numbers each, with the weights, which stay in
// registers; then LayerNorm and GELU where the product left them, and shared memory to write whole lines.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "conv_norm_gelu.h"
#include "device.cuh"
#include "gelu.cuh"
#include "kernels.h"

namespace vmamba::cuda {
namespace {

constexpr int kWarps = 4, kResidentBlocks = 4;
constexpr int kPositions = 16;  // to a warp
constexpr int kTaps = 8;        // of a patch, to a lane

// One number of a patch. Of the four lanes that share a patch, three have the first eight numbers of one row each, the
// last one has the ninth numbers of all.
struct Tap {
    int row, column, channel;
    __device__ __forceinline__ Tap(int q, int i)
        : row(q < kStemKernel ? q : i), column(q < kStemKernel ? i / 3 : 2), channel(q < kStemKernel ? i % 3 : 2) {}
    __device__ static __forceinline__ bool exists(int q, int i) { return q < kStemKernel || i < kStemKernel; }
};

// A lane's numbers of the patch of one position.
template <typename X>
struct Patch {
    X values[kTaps];

    // Zeros beyond the image, and beyond the last position.
    __device__ __forceinline__ void read(const ConvNormGelu& stem, const int (&offsets)[kTaps], uint32_t position,
                                         uint32_t positions, const Divisor& out_width, const Divisor& out_height,
                                         int q) {
        const uint32_t line = divide(position, out_width), image = divide(line, out_height);
        const int column = static_cast<int>(position - line * out_width.by) * stem.stride - 1;
        const int row = static_cast<int>(line - image * out_height.by) * stem.stride - 1;
        const X* corner = static_cast<const X*>(stem.image) + image * stem.image_stride +
                          int64_t{row} * stem.row_stride + int64_t{column} * stem.column_stride;
        const auto row_inside = [&](int r) { return static_cast<uint32_t>(row + r) < uint32_t(stem.height); };
        const auto column_inside = [&](int c) { return static_cast<uint32_t>(column + c) < uint32_t(stem.width); };
        const bool there = position < positions;
        const bool line_inside = there && row_inside(q);
#pragma unroll
        for (int i = 0; i < kTaps; ++i) {
            bool inside = line_inside && column_inside(i / 3);
            if (q == kStemKernel) inside = there && i < kStemKernel && row_inside(i) && column_inside(2);
            values[i] = from_float<X>(0.0f);
            if (inside) values[i] = __ldg(corner + offsets[i]);
        }
    }
    template <typename T>
    __device__ __forceinline__ uint32_t pair(int i) const {
        return pack<T>(to_float(values[2 * i]), to_float(values[2 * i + 1]));
    }
};

// The weights of one channel, as the lane's numbers of a patch want them.
template <typename T>
__device__ __forceinline__ uint4 weights_of(const ConvNormGelu& stem, int channel, int q) {
    float taps[kTaps];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
        const Tap tap(q, i);
        const int64_t at = channel * stem.weight_strides[0] + tap.channel * stem.weight_strides[1] +
                           tap.row * stem.weight_strides[2] + tap.column * stem.weight_strides[3];
        taps[i] = Tap::exists(q, i) ? stem.weight[at] : 0.0f;
    }
    return {pack<T>(taps[0], taps[1]), pack<T>(taps[2], taps[3]), pack<T>(taps[4], taps[5]), pack<T>(taps[6], taps[7])};
}

// Numbers of a row's neighbouring channels 2j and 2j + 1 of lane q's share, for tile j.
__device__ __forceinline__ int share(int j, int q, int tiles) { return q * tiles + j; }

// LayerNorm and GELU of a row that four lanes share: half 0 or 1 of the tiles.
template <typename T, int Tiles>
__device__ __forceinline__ void norm_gelu(float (&values)[Tiles][4], int half, float eps, const float2* weight,
                                          const float2* bias, int q, uint32_t* row) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < Tiles; ++j) sum += values[j][2 * half] + values[j][2 * half + 1];
    const float mean = quad_sum(sum) * (1.0f / (8 * Tiles));
#pragma unroll
    for (int j = 0; j < Tiles; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
            values[j][i] -= mean;
            squares = fmaf(values[j][i], values[j][i], squares);
        }
    const float rstd = rsqrtf(fmaf(quad_sum(squares), 1.0f / (8 * Tiles), eps));
    uint32_t packs[Tiles];
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
        const float2 w = weight[share(j, q, Tiles)], b = bias[share(j, q, Tiles)];
        packs[j] = pack<T>(gelu_fast<T>(fmaf(values[j][2 * half] * rstd, w.x, b.x)),
                           gelu_fast<T>(fmaf(values[j][2 * half + 1] * rstd, w.y, b.y)));
    }
#pragma unroll
    for (int j = 0; j < Tiles; j += 2)
        *reinterpret_cast<uint2*>(row + share(j, q, Tiles)) = make_uint2(packs[j], packs[j + 1]);
}

template <typename X, typename T, int Tiles>
__global__ void __launch_bounds__(32 * kWarps, kResidentBlocks)
    conv_norm_gelu_kernel(const __grid_constant__ ConvNormGelu stem, Divisor out_width, Divisor out_height,
                          uint32_t positions) {
    constexpr int kChannels = 8 * Tiles, kRowPieces = kChannels / 8, kPieces = kPositions * kRowPieces;
    __shared__ float2 numbers[3][kChannels / 2];
    __shared__ uint4 results[kWarps][kPieces];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    for (int i = threadIdx.x; i < kChannels / 2; i += blockDim.x) {
        numbers[0][i] = reinterpret_cast<const float2*>(stem.bias)[i];
        numbers[1][i] = reinterpret_cast<const float2*>(stem.norm_weight)[i];
        numbers[2][i] = reinterpret_cast<const float2*>(stem.norm_bias)[i];
    }
    __syncthreads();
    // Which channel is a column of a product is free: so that a lane's are neighbours.
    uint4 weights[Tiles];
#pragma unroll
    for (int j = 0; j < Tiles; ++j) weights[j] = weights_of<T>(stem, 2 * share(j, g / 2, Tiles) + g % 2, q);
    int offsets[kTaps];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
        const Tap tap(q, i);
        offsets[i] = tap.row * stem.row_stride + tap.column * stem.column_stride + tap.channel * stem.channel_stride;
    }

    const uint32_t step = gridDim.x * kWarps * kPositions;
    uint32_t first = (blockIdx.x * kWarps + warp) * kPositions;
    Patch<X> patches[2];
    const auto read = [&] {
#pragma unroll
        for (int r = 0; r < 2; ++r)
            patches[r].read(stem, offsets, first + g + 8 * r, positions, out_width, out_height, q);
    };
    read();
    auto* rows = reinterpret_cast<uint32_t*>(results[warp]);
    while (first < positions) {
        uint32_t left[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) left[i / 2][i % 2 * 2 + r] = patches[r].template pair<T>(i);
        const uint32_t written = first;
        first += step;
        read();
        float values[Tiles][4];
#pragma unroll
        for (int j = 0; j < Tiles; ++j) {
            const float2 bias = numbers[0][share(j, q, Tiles)];
            values[j][0] = values[j][2] = bias.x;
            values[j][1] = values[j][3] = bias.y;
            mma_16bit<T>(values[j], left[0], weights[j].x, weights[j].y);
            mma_16bit<T>(values[j], left[1], weights[j].z, weights[j].w);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            norm_gelu<T, Tiles>(values, half, stem.eps, numbers[1], numbers[2], q,
                                rows + (g + 8 * half) * kChannels / 2);
        __syncwarp();
        auto* y = static_cast<uint4*>(stem.y) + int64_t{written} * kRowPieces;
#pragma unroll
        for (int piece = lane; piece < kPieces; piece += 32)
            if (piece / kRowPieces < positions - written) y[piece] = results[warp][piece];
        __syncwarp();
    }
}

template <typename X, typename T, int Tiles>
void run(const ConvNormGelu& stem, int device) {
    const int64_t most = int64_t{device_attribute(cudaDevAttrMultiProcessorCount, device)} * kResidentBlocks;
    const int64_t blocks = std::min(ceil_div(stem.positions(), kWarps * kPositions), most);
    launch(conv_norm_gelu_kernel<X, T, Tiles>, blocks, 32 * kWarps, 0, current_stream(device), stem,
           Divisor(stem.out_width()), Divisor(stem.out_height()), static_cast<uint32_t>(stem.positions()));
}

template <typename X, typename T>
void run_as(const ConvNormGelu& stem, int device) {
    (stem.channels == 32 ? run<X, T, 4> : stem.channels == 48 ? run<X, T, 6> : run<X, T, 8>)(stem, device);
}

}  // namespace

void conv_norm_gelu(const ConvNormGelu& stem, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const bool wide = stem.image_dtype == Scalar::f32;
    if (stem.y_dtype == Scalar::bf16) {
        (wide ? run_as<float, __nv_bfloat16> : run_as<__nv_bfloat16, __nv_bfloat16>)(stem, device);
    } else {
        (wide ? run_as<float, __half> : run_as<__half, __half>)(stem, device);
    }
}

}  // namespace vmamba::cuda

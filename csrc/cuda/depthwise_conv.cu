// Host side of the depthwise convolution: what is a map, what is a filter, and the sum of the filter's gradients.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "depthwise_conv.h"
#include "depthwise_conv_kernels.h"
#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {
namespace {

int padding_of_the_turned(int kernel, int dilation, int stride, int padding, int64_t size, int64_t out_size) {
    return static_cast<int>((kernel - 1) * dilation - padding - (size - 1) + (out_size - 1) * stride);
}

Filter filter_of(const DepthwiseConv& conv) {
    Filter filter;
    filter.weight = conv.weight;
    filter.bias = conv.bias;
    filter.dtype = conv.weight_dtype;
    filter.channels = static_cast<int>(conv.channels);
    filter.directions = conv.directions;
    filter.height = conv.kernel_height;
    filter.width = conv.kernel_width;
    filter.stride_height = conv.stride_height;
    filter.stride_width = conv.stride_width;
    filter.dilation_height = conv.dilation_height;
    filter.dilation_width = conv.dilation_width;
    filter.top[0] = conv.top;
    filter.left[0] = conv.left;
    filter.top[1] = padding_of_the_turned(conv.kernel_height, conv.dilation_height, conv.stride_height, conv.top,
                                          conv.height, conv.out_height);
    filter.left[1] = padding_of_the_turned(conv.kernel_width, conv.dilation_width, conv.stride_width, conv.left,
                                           conv.width, conv.out_width);
    if (conv.residual)
        filter.centre = conv.top / conv.dilation_height * conv.kernel_width + conv.left / conv.dilation_width;
    filter.replicate = conv.replicate;
    return filter;
}

ConvMap map_of_x(const DepthwiseConv& conv) {
    ConvMap map;
    map.data = const_cast<void*>(conv.x);
    map.image_stride = conv.image_stride;
    map.row_stride = conv.row_stride;
    map.column_stride = static_cast<uint32_t>(conv.column_stride);
    map.height = static_cast<int>(conv.height);
    map.width = static_cast<int>(conv.width);
    return map;
}

ConvMap map_of_gradient(const DepthwiseConv& conv, const ConvGrad& dy) {
    ConvMap map;
    map.data = const_cast<void*>(dy.data);
    map.image_stride = dy.image_stride;
    map.direction_stride = dy.direction_stride;
    map.row_stride = dy.row_stride;
    map.column_stride = static_cast<uint32_t>(dy.column_stride);
    map.height = static_cast<int>(conv.out_height);
    map.width = static_cast<int>(conv.out_width);
    return map;
}

// A map for each direction, one after the other.
ConvMap contiguous_map(void* data, int64_t batch, int64_t height, int64_t width, int64_t channels) {
    ConvMap map;
    map.data = data;
    map.column_stride = static_cast<uint32_t>(channels);
    map.row_stride = width * channels;
    map.image_stride = height * map.row_stride;
    map.direction_stride = batch * map.image_stride;
    map.height = static_cast<int>(height);
    map.width = static_cast<int>(width);
    return map;
}

ConvMap contiguous_result(const DepthwiseConv& conv, void* data) {
    return contiguous_map(data, conv.batch, conv.out_height, conv.out_width, conv.channels);
}

int64_t bytes_of(Scalar type) { return type == Scalar::f32 ? 4 : 2; }

// Whether every position's channels can be loaded four at a time.
bool loads_packs(const ConvMap& map, const DepthwiseConv& conv) {
    const auto misaligned = reinterpret_cast<uintptr_t>(map.data) % (4 * bytes_of(conv.dtype));
    return !misaligned && conv.channels % 4 == 0 && map.image_stride % 4 == 0 && map.direction_stride % 4 == 0 &&
           map.row_stride % 4 == 0 && map.column_stride % 4 == 0;
}

constexpr int kBlocksPerProcessor = 6;  // two or three run at a time

int blocks_of_backward(const DepthwiseConv& conv, int device) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
    const int64_t others = conv.directions * ceil_div(conv.channels, ConvLayout::kMostChannels);
    const int64_t tiles = ceil_div(conv.batch * conv.out_height * ceil_div(conv.out_width, 8), 32);
    return static_cast<int>(
        std::max<int64_t>(1, std::min(tiles, ceil_div(int64_t{kBlocksPerProcessor} * processors, others))));
}

template <typename Task>
using Launcher = void (*)(const Task&, bool, cudaStream_t);

template <typename Task>
void run(Scalar dtype, Launcher<Task> f32, Launcher<Task> bf16, Launcher<Task> f16, const Task& task, bool packed,
         cudaStream_t stream) {
    (dtype == Scalar::f32 ? f32 : dtype == Scalar::bf16 ? bf16 : f16)(task, packed, stream);
}

void run_forward(Scalar dtype, const ConvForward& task, bool packed, cudaStream_t stream) {
    run(dtype, conv_forward<float>, conv_forward<__nv_bfloat16>, conv_forward<__half>, task, packed, stream);
}

// Sums the blocks' rows: a thread a number of (tap or bias, channel), in eight interleaved parts, added in order.
constexpr int kSumWidth = 32, kSumParts = 8;
__global__ void sum_filter_gradients(const float* partial, int blocks, int pitch, const __grid_constant__ Filter filter,
                                     void* dweight, void* dbias) {
    __shared__ float parts[kSumParts][kSumWidth];
    const int taps = filter.taps(), size = (taps + 1) * pitch, chunks = gridDim.y, chunk = blockIdx.y;
    const int column = blockIdx.x * kSumWidth + threadIdx.x, direction = blockIdx.z;
    float total = 0.0f;
    if (column < size)
        for (int block = threadIdx.y; block < blocks; block += kSumParts)
            total += partial[((int64_t(block) * filter.directions + direction) * chunks + chunk) * size + column];
    parts[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    const int tap = column / pitch, channel = chunk * pitch + column % pitch;
    if (threadIdx.y || column >= size || channel >= filter.channels) return;
    for (int part = 1; part < kSumParts; ++part) total += parts[part][threadIdx.x];
    const int64_t row = int64_t(direction) * filter.channels + channel;
    if (tap < taps) {
        store_as(dweight, row * taps + (filter.mirrored[direction] ? taps - 1 - tap : tap), total, filter.dtype);
    } else if (dbias) {
        store_as(dbias, row, total, filter.dtype);
    }
}

}  // namespace

void depthwise_conv_forward(const DepthwiseConv& conv, void* y, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    ConvForward task;
    task.source = map_of_x(conv);
    task.target = contiguous_result(conv, y);
    task.filter = filter_of(conv);
    task.batch = conv.batch;
    task.silu = conv.silu;
    run_forward(conv.dtype, task, loads_packs(task.source, conv) && loads_packs(task.target, conv),
                current_stream(device));
}

int64_t depthwise_conv_backward_workspace(const DepthwiseConv& conv, int device) {
    const auto padded_channels = [&](int pack) {
        const ConvLayout layout(map_of_x(conv), conv.batch, static_cast<int>(conv.channels), pack, 1);
        return int64_t(layout.chunks) * layout.lanes * pack;
    };
    return int64_t(blocks_of_backward(conv, device)) * conv.directions * (conv.taps() + 1) *
           std::max(padded_channels(1), padded_channels(4)) * int64_t(sizeof(float));
}

void depthwise_conv_backward(const DepthwiseConv& conv, const ConvGrad& dy, void* dz, void* dx, void* dweight,
                             void* dbias, void* workspace, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    ConvBackward task;
    task.x = map_of_x(conv);
    task.dy = map_of_gradient(conv, dy);
    task.dz = conv.silu ? contiguous_result(conv, dz) : task.dy;
    task.filter = filter_of(conv);
    task.batch = conv.batch;
    task.blocks = blocks_of_backward(conv, device);
    task.partial = static_cast<float*>(workspace);
    task.silu = conv.silu;
    const bool packed = loads_packs(task.x, conv) && loads_packs(task.dy, conv) && loads_packs(task.dz, conv);
    run(conv.dtype, conv_backward<float>, conv_backward<__nv_bfloat16>, conv_backward<__half>, task, packed, stream);

    const int pack = packed ? 4 : 1;
    const ConvLayout layout(task.dz, conv.batch, task.filter.channels, pack, 1);
    const int pitch = layout.lanes * pack, size = (conv.taps() + 1) * pitch;
    const dim3 grid((size + kSumWidth - 1) / kSumWidth, layout.chunks, conv.directions);
    sum_filter_gradients<<<grid, dim3(kSumWidth, kSumParts), 0, stream>>>(task.partial, static_cast<int>(task.blocks),
                                                                          pitch, task.filter, dweight, dbias);
    check(cudaGetLastError());

    const ConvMap dx_map = contiguous_map(dx, conv.batch, conv.height, conv.width, conv.channels);
    const bool dx_packed = loads_packs(task.dz, conv) && loads_packs(dx_map, conv);
    if (conv.stride_height == 1 && conv.stride_width == 1 && !conv.replicate) {
        ConvForward transposed;
        transposed.source = task.dz;
        transposed.target = dx_map;
        transposed.filter = task.filter.transposed();
        transposed.batch = conv.batch;
        transposed.sums = true;
        return run_forward(conv.dtype, transposed, dx_packed, stream);
    }
    const ConvGather gather{task.dz, dx_map, task.filter, conv.batch};
    run(conv.dtype, conv_gather<float>, conv_gather<__nv_bfloat16>, conv_gather<__half>, gather, dx_packed, stream);
}

}  // namespace vmamba::cuda

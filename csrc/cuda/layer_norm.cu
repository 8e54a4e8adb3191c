// LayerNorm of rows of up to 1536 channels: a warp holds a row in registers, reads it once and writes it once, in the
// dtype that the next layer wants. PyTorch's kernel gives a row a whole block, which narrow rows cannot fill.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <type_traits>

#include "device.cuh"
#include "kernels.h"
#include "layer_norm.h"

namespace vmamba::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kPack = 4;  // channels a lane loads at once

template <typename T>
struct alignas(sizeof(T) * kPack) Pack {
    T values[kPack];
};

template <typename T>
__device__ __forceinline__ void load_pack(const T* from, float* to) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = to_float(pack.values[i]);
}

template <typename T>
__device__ __forceinline__ void store_pack(T* to, const float* from) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.values[i] = from_float<T>(from[i]);
    *reinterpret_cast<Pack<T>*>(to) = pack;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
    return x;
}

// Packs of one lane: pack p of lane l holds the channels from (p * 32 + l) * 4 on.
template <int Packs>
struct Row {
    float values[Packs][kPack];

    template <typename T>
    __device__ __forceinline__ void read(const T* row, int lane, int channels) {
#pragma unroll
        for (int p = 0; p < Packs; ++p) {
            const int channel = (p * kWarp + lane) * kPack;
            if (channel < channels) {
                load_pack(row + channel, values[p]);
            } else {
#pragma unroll
                for (int i = 0; i < kPack; ++i) values[p][i] = 0.0f;
            }
        }
    }
    // Adds a row, and rounds the sum as a tensor of type X holds it.
    template <typename X, typename T>
    __device__ __forceinline__ void add(const T* row, int lane, int channels) {
        Row<Packs> other;
        other.read(row, lane, channels);
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[p][i] = to_float(from_float<X>(values[p][i] + other.values[p][i]));
    }
    template <typename T>
    __device__ __forceinline__ void write(T* row, int lane, int channels) const {
#pragma unroll
        for (int p = 0; p < Packs; ++p) {
            const int channel = (p * kWarp + lane) * kPack;
            if (channel < channels) store_pack(row + channel, values[p]);
        }
    }
};

template <typename X, typename Y, int Packs, int Rows>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    forward_kernel(LayerNorm norm, Y* __restrict__ y, X* __restrict__ sums, float* __restrict__ means,
                   float* __restrict__ rstds) {
    const int lane = threadIdx.x % kWarp;
    const int channels = static_cast<int>(norm.channels);
    const int64_t first = (int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp) * Rows;
    Row<Packs> rows[Rows], weight, bias;
#pragma unroll
    for (int r = 0; r < Rows; ++r)
        if (first + r < norm.rows)
            rows[r].read(static_cast<const X*>(norm.x) + (first + r) * norm.channels, lane, channels);
    if (norm.branch) {
#pragma unroll
        for (int r = 0; r < Rows; ++r)
            if (first + r < norm.rows) {
                const int64_t at = (first + r) * norm.channels;
                rows[r].template add<X>(static_cast<const Y*>(norm.branch) + at, lane, channels);
                rows[r].write(sums + at, lane, channels);
            }
    }
    weight.read(norm.weight, lane, channels);
    bias.read(norm.bias, lane, channels);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        if (first + r >= norm.rows) return;
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) sum += rows[r].values[p][i];
        const float mean = warp_sum(sum) / channels;
        float squares = 0.0f;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
            if ((p * kWarp + lane) * kPack < channels)
#pragma unroll
                for (int i = 0; i < kPack; ++i) {
                    const float centred = rows[r].values[p][i] - mean;
                    squares += centred * centred;
                }
        const float rstd = rsqrtf(warp_sum(squares) / channels + norm.eps);
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i)
                rows[r].values[p][i] = (rows[r].values[p][i] - mean) * rstd * weight.values[p][i] + bias.values[p][i];
        rows[r].write(y + (first + r) * norm.channels, lane, channels);
        if (means && lane == 0) {
            means[first + r] = mean;
            rstds[first + r] = rstd;
        }
    }
}

// Every warp takes the rows warp, warp + warps, ... and sums its share of the parameters' gradients in registers; the
// block adds its warps up in order and writes one row of (2, channels) to `partial`.
template <typename X, typename Y, int Packs>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    backward_kernel(LayerNorm norm, LayerNormGradients gradients, float* __restrict__ partial) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int channels = static_cast<int>(norm.channels);
    const int64_t warps = int64_t(gridDim.x) * kWarpsPerBlock;
    Row<Packs> weight, dweight, dbias;
    weight.read(norm.weight, lane, channels);
#pragma unroll
    for (int p = 0; p < Packs; ++p)
#pragma unroll
        for (int i = 0; i < kPack; ++i) dweight.values[p][i] = dbias.values[p][i] = 0.0f;

    for (int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + warp; row < norm.rows; row += warps) {
        Row<Packs> x, g;
        x.read(static_cast<const X*>(norm.x) + row * norm.channels, lane, channels);
        g.read(static_cast<const Y*>(gradients.dy) + row * norm.channels, lane, channels);
        const float mean = gradients.mean[row], rstd = gradients.rstd[row];
        float sum = 0.0f, along = 0.0f;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
                const float normed = (x.values[p][i] - mean) * rstd, grad = g.values[p][i];
                dweight.values[p][i] += grad * normed;
                dbias.values[p][i] += grad;
                g.values[p][i] = grad * weight.values[p][i];
                sum += g.values[p][i];
                along += g.values[p][i] * normed;
                x.values[p][i] = normed;
            }
        sum = warp_sum(sum) / channels;
        along = warp_sum(along) / channels;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) x.values[p][i] = rstd * (g.values[p][i] - sum - x.values[p][i] * along);
        if (gradients.dsum)
            x.template add<float>(static_cast<const X*>(gradients.dsum) + row * norm.channels, lane, channels);
        x.write(static_cast<X*>(gradients.dx) + row * norm.channels, lane, channels);
        if (gradients.dbranch) x.write(static_cast<Y*>(gradients.dbranch) + row * norm.channels, lane, channels);
    }

    extern __shared__ float shared[];  // (warps, 2, channels)
    dweight.write(shared + (2 * warp) * channels, lane, channels);
    dbias.write(shared + (2 * warp + 1) * channels, lane, channels);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * channels; i += blockDim.x) {
        float total = 0.0f;
        for (int w = 0; w < kWarpsPerBlock; ++w) total += shared[w * 2 * channels + i];
        partial[int64_t(blockIdx.x) * 2 * channels + i] = total;
    }
}

// Sums the blocks' rows of (2, channels): 32 columns a block, in 32 interleaved parts that are added in order.
constexpr int kSumParts = 32;
__global__ void sum_partials(const float* partial, int blocks, int channels, float* dweight, float* dbias) {
    __shared__ float parts[kSumParts][kWarp];
    const int column = blockIdx.x * kWarp + threadIdx.x;
    float total = 0.0f;
    if (column < 2 * channels)
#pragma unroll 8
        for (int block = threadIdx.y; block < blocks; block += kSumParts)
            total += partial[int64_t(block) * 2 * channels + column];
    parts[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && column < 2 * channels) {
        for (int part = 1; part < kSumParts; ++part) total += parts[part][threadIdx.x];
        (column < channels ? dweight[column] : dbias[column - channels]) = total;
    }
}

int backward_blocks(const LayerNorm& norm, int device) {
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    const int64_t wanted = (norm.rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, int64_t(processors) * 8)));
}

// Calls `f` with the number of packs a lane needs, as a compile-time constant.
template <typename F>
void with_packs(int64_t channels, F f) {
    const int64_t packs = (channels + kWarp * kPack - 1) / (kWarp * kPack);
    if (packs <= 1) return f(std::integral_constant<int, 1>{});
    if (packs <= 2) return f(std::integral_constant<int, 2>{});
    if (packs <= 3) return f(std::integral_constant<int, 3>{});
    if (packs <= 4) return f(std::integral_constant<int, 4>{});
    if (packs <= 6) return f(std::integral_constant<int, 6>{});
    if (packs <= 8) return f(std::integral_constant<int, 8>{});
    f(std::integral_constant<int, 12>{});
}

template <typename T>
struct Type {
    using type = T;
};

// Calls `f` with the types of x and y: 16-bit ones never meet the other 16-bit one.
template <typename F>
void with_types(Scalar x, Scalar y, F f) {
    if (x == Scalar::bf16) {
        if (y == Scalar::bf16) return f(Type<__nv_bfloat16>{}, Type<__nv_bfloat16>{});
        return f(Type<__nv_bfloat16>{}, Type<float>{});
    }
    if (x == Scalar::f16) {
        if (y == Scalar::f16) return f(Type<__half>{}, Type<__half>{});
        return f(Type<__half>{}, Type<float>{});
    }
    if (y == Scalar::bf16) return f(Type<float>{}, Type<__nv_bfloat16>{});
    if (y == Scalar::f16) return f(Type<float>{}, Type<__half>{});
    f(Type<float>{}, Type<float>{});
}

template <typename X, typename Y, int Packs>
void launch_forward(const LayerNorm& norm, void* y, void* sum, float* mean, float* rstd, cudaStream_t stream) {
    constexpr int kRows = Packs <= 1 ? 4 : Packs <= 3 ? 2 : 1;  // rows in flight per warp
    const int64_t per_block = int64_t(kWarpsPerBlock) * kRows;
    launch(forward_kernel<X, Y, Packs, kRows>, (norm.rows + per_block - 1) / per_block, kWarp * kWarpsPerBlock, 0,
           stream, norm, static_cast<Y*>(y), static_cast<X*>(sum), mean, rstd);
}

template <typename X, typename Y, int Packs>
void launch_backward(const LayerNorm& norm, const LayerNormGradients& gradients, float* partial, int blocks,
                     cudaStream_t stream) {
    launch(backward_kernel<X, Y, Packs>, blocks, kWarp * kWarpsPerBlock,
           int64_t(kWarpsPerBlock) * 2 * norm.channels * int64_t(sizeof(float)), stream, norm, gradients, partial);
}

}  // namespace

void layer_norm_forward(const LayerNorm& norm, void* y, void* sum, float* mean, float* rstd, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    with_types(norm.x_dtype, norm.y_dtype, [&](auto x_type, auto y_type) {
        with_packs(norm.channels, [&](auto packs) {
            launch_forward<typename decltype(x_type)::type, typename decltype(y_type)::type, decltype(packs)::value>(
                norm, y, sum, mean, rstd, stream);
        });
    });
}

int64_t layer_norm_backward_workspace(const LayerNorm& norm, int device) {
    return int64_t(backward_blocks(norm, device)) * 2 * norm.channels * int64_t(sizeof(float));
}

void layer_norm_backward(const LayerNorm& norm, const LayerNormGradients& gradients, void* workspace, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    const int blocks = backward_blocks(norm, device);
    float* partial = static_cast<float*>(workspace);
    with_types(norm.x_dtype, norm.y_dtype, [&](auto x_type, auto y_type) {
        with_packs(norm.channels, [&](auto packs) {
            launch_backward<typename decltype(x_type)::type, typename decltype(y_type)::type, decltype(packs)::value>(
                norm, gradients, partial, blocks, stream);
        });
    });
    const int columns = static_cast<int>(2 * norm.channels);
    sum_partials<<<(columns + kWarp - 1) / kWarp, dim3(kWarp, kSumParts), 0, stream>>>(
        partial, blocks, static_cast<int>(norm.channels), gradients.dweight, gradients.dbias);
    check(cudaGetLastError());
}

}  // namespace vmamba::cuda

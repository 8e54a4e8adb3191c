// LayerNorm of rows of up to 1536 channels: a warp holds a row in registers, or up to eight narrow ones, reads it once
// and writes it once, in the dtype that the next layer wants. PyTorch's kernel gives a row a whole block, which narrow
// rows cannot fill.
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

// Sums over the lanes at distances From / 2, From / 4, ..., To.
template <int From, int To = 1>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
    for (int distance = From / 2; distance >= To; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
    return x;
}

// A row held by `Lanes` neighbouring lanes: pack p of lane l has the channels from (p * Lanes + l) * 4 on.
template <int Lanes, int Packs>
struct Row {
    float values[Packs][kPack];

    static __device__ __forceinline__ int channel(int p, int lane) { return (p * Lanes + lane) * kPack; }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[p][i] = 0.0f;
    }

    template <typename T>
    __device__ __forceinline__ void read(const T* row, int lane, int channels) {
#pragma unroll
        for (int p = 0; p < Packs; ++p) {
            if (channel(p, lane) < channels) {
                load_pack(row + channel(p, lane), values[p]);
            } else {
#pragma unroll
                for (int i = 0; i < kPack; ++i) values[p][i] = 0.0f;
            }
        }
    }
    // Adds a row, and rounds the sum as a tensor of type X holds it.
    template <typename X, typename T>
    __device__ __forceinline__ void add(const T* row, int lane, int channels) {
        Row other;
        other.read(row, lane, channels);
        add<X>(other);
    }
    template <typename X>
    __device__ __forceinline__ void add(const Row& other) {
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[p][i] = to_float(from_float<X>(values[p][i] + other.values[p][i]));
    }
    template <typename T>
    __device__ __forceinline__ void write(T* row, int lane, int channels) const {
#pragma unroll
        for (int p = 0; p < Packs; ++p) {
            if (channel(p, lane) < channels) store_pack(row + channel(p, lane), values[p]);
        }
    }
};

// A warp has 32 / Lanes rows side by side, and Rows behind each other in flight.
template <typename X, typename Y, int Lanes, int Packs, int Rows>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    forward_kernel(LayerNorm norm, Y* __restrict__ y, X* __restrict__ sums, float* __restrict__ means,
                   float* __restrict__ rstds) {
    constexpr int kSideBySide = kWarp / Lanes;
    const int lane = threadIdx.x % Lanes;
    const int channels = static_cast<int>(norm.channels);
    const int64_t warp = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
    const int64_t first = warp * kSideBySide * Rows + threadIdx.x % kWarp / Lanes;
    const auto row_of = [&](int r) { return first + r * kSideBySide; };
    Row<Lanes, Packs> rows[Rows], weight, bias;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        if (row_of(r) < norm.rows) {
            rows[r].read(static_cast<const X*>(norm.x) + row_of(r) * norm.channels, lane, channels);
        } else {
            rows[r].clear();
        }
    }
    if (norm.branch) {
#pragma unroll
        for (int r = 0; r < Rows; ++r)
            if (row_of(r) < norm.rows) {
                const int64_t at = row_of(r) * norm.channels;
                rows[r].template add<X>(static_cast<const Y*>(norm.branch) + at, lane, channels);
                rows[r].write(sums + at, lane, channels);
            }
    }
    weight.read(norm.weight, lane, channels);
    bias.read(norm.bias, lane, channels);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) sum += rows[r].values[p][i];
        const float mean = lane_sum<Lanes>(sum) / channels;
        float squares = 0.0f;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
            if (rows[r].channel(p, lane) < channels)
#pragma unroll
                for (int i = 0; i < kPack; ++i) {
                    const float centred = rows[r].values[p][i] - mean;
                    squares += centred * centred;
                }
        const float rstd = rsqrtf(lane_sum<Lanes>(squares) / channels + norm.eps);
        if (row_of(r) >= norm.rows) continue;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i)
                rows[r].values[p][i] = (rows[r].values[p][i] - mean) * rstd * weight.values[p][i] + bias.values[p][i];
        rows[r].write(y + row_of(r) * norm.channels, lane, channels);
        if (means && lane == 0) {
            means[row_of(r)] = mean;
            rstds[row_of(r)] = rstd;
        }
    }
}

// Blocks a multiprocessor holds at least, all of which the backward kernel starts.
template <int Packs>
constexpr int kResident = Packs <= 4   ? 4
                          : Packs <= 6 ? 3
                                       : 2;

// All lanes' rows of the grid take turns through the input and sum their shares of the parameters' gradients in
// registers; the block adds its own up in order and writes one row of (2, channels) to `partial`.
template <typename X, typename Y, int Lanes, int Packs>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, kResident<Packs>)
    backward_kernel(LayerNorm norm, LayerNormGradients gradients, float* __restrict__ partial) {
    constexpr int kSideBySide = kWarp / Lanes;
    constexpr bool kReadAhead = Packs <= 4;  // else there are no registers for it
    const int lane = threadIdx.x % Lanes, warp = threadIdx.x / kWarp;
    const int channels = static_cast<int>(norm.channels);
    const int64_t warps = int64_t(gridDim.x) * kWarpsPerBlock;
    Row<Lanes, Packs> weight, dweight, dbias;
    weight.read(norm.weight, lane, channels);
    dweight.clear();
    dbias.clear();

    // Lanes of rows behind the last one go on with zeros, since sums are made by whole warps.
    for (int64_t first = (int64_t(blockIdx.x) * kWarpsPerBlock + warp) * kSideBySide; first < norm.rows;
         first += warps * kSideBySide) {
        const int64_t row = first + threadIdx.x % kWarp / Lanes, at = row * norm.channels;
        const bool there = row < norm.rows;
        Row<Lanes, Packs> x, g, dsum;
        float mean = 0.0f, rstd = 0.0f;
        if (there) {
            x.read(static_cast<const X*>(norm.x) + at, lane, channels);
            g.read(static_cast<const Y*>(gradients.dy) + at, lane, channels);
            if (kReadAhead && gradients.dsum) dsum.read(static_cast<const X*>(gradients.dsum) + at, lane, channels);
            mean = gradients.mean[row], rstd = gradients.rstd[row];
        } else {
            x.clear();
            g.clear();
        }
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
        sum = lane_sum<Lanes>(sum) / channels;
        along = lane_sum<Lanes>(along) / channels;
        if (!there) continue;
#pragma unroll
        for (int p = 0; p < Packs; ++p)
#pragma unroll
            for (int i = 0; i < kPack; ++i) x.values[p][i] = rstd * (g.values[p][i] - sum - x.values[p][i] * along);
        if (gradients.dsum) {
            if constexpr (kReadAhead) {
                x.template add<float>(dsum);
            } else {
                x.template add<float>(static_cast<const X*>(gradients.dsum) + at, lane, channels);
            }
        }
        x.write(static_cast<X*>(gradients.dx) + at, lane, channels);
        if (gradients.dbranch) x.write(static_cast<Y*>(gradients.dbranch) + at, lane, channels);
    }

    // Over the rows side by side, then over the warps.
#pragma unroll
    for (int p = 0; p < Packs; ++p)
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            dweight.values[p][i] = lane_sum<kWarp, Lanes>(dweight.values[p][i]);
            dbias.values[p][i] = lane_sum<kWarp, Lanes>(dbias.values[p][i]);
        }
    extern __shared__ float shared[];  // (warps, 2, channels)
    if (threadIdx.x % kWarp < Lanes) {
        dweight.write(shared + (2 * warp) * channels, lane, channels);
        dbias.write(shared + (2 * warp + 1) * channels, lane, channels);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * channels; i += blockDim.x) {
        float total = 0.0f;
        for (int w = 0; w < kWarpsPerBlock; ++w) total += shared[w * 2 * channels + i];
        partial[int64_t(blockIdx.x) * 2 * channels + i] = total;
    }
}

template <int Lanes, int Packs>
struct Shape {
    static constexpr int kLanes = Lanes, kPacks = Packs;
    static constexpr int kRowsAWarp = kWarp / Lanes;
};

// Calls `f` with the lanes that hold a row and the packs a lane has of it: few lanes with two or three packs where that
// is enough, so that none is idle and fewer take part in a sum.
template <typename F>
auto with_shape(int64_t channels, F f) {
    const auto fits = [&](int lanes, int packs) { return channels <= lanes * packs * kPack; };
    if (fits(4, 2)) return f(Shape<4, 2>{});
    if (fits(4, 3)) return f(Shape<4, 3>{});
    if (fits(8, 2)) return f(Shape<8, 2>{});
    if (fits(8, 3)) return f(Shape<8, 3>{});
    if (fits(16, 2)) return f(Shape<16, 2>{});
    if (fits(16, 3)) return f(Shape<16, 3>{});
    if (fits(32, 2)) return f(Shape<32, 2>{});
    if (fits(32, 3)) return f(Shape<32, 3>{});
    if (fits(32, 4)) return f(Shape<32, 4>{});
    if (fits(32, 6)) return f(Shape<32, 6>{});
    if (fits(32, 8)) return f(Shape<32, 8>{});
    return f(Shape<32, 12>{});
}

int backward_blocks(const LayerNorm& norm, int device) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
    return with_shape(norm.channels, [&](auto shape) {
        constexpr int kRows = kWarpsPerBlock * decltype(shape)::kRowsAWarp;
        const int64_t wanted = (norm.rows + kRows - 1) / kRows, most = int64_t(processors) * kResident<shape.kPacks>;
        return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
    });
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

template <typename X, typename Y, typename Shape>
void launch_forward(const LayerNorm& norm, void* y, void* sum, float* mean, float* rstd, cudaStream_t stream) {
    constexpr int kRows = Shape::kPacks <= 3 ? 2 : 1;
    constexpr int kPerBlock = kWarpsPerBlock * Shape::kRowsAWarp * kRows;
    launch(forward_kernel<X, Y, Shape::kLanes, Shape::kPacks, kRows>, (norm.rows + kPerBlock - 1) / kPerBlock,
           kWarp * kWarpsPerBlock, 0, stream, norm, static_cast<Y*>(y), static_cast<X*>(sum), mean, rstd);
}

template <typename X, typename Y, typename Shape>
void launch_backward(const LayerNorm& norm, const LayerNormGradients& gradients, float* partial, int blocks,
                     cudaStream_t stream) {
    launch(backward_kernel<X, Y, Shape::kLanes, Shape::kPacks>, blocks, kWarp * kWarpsPerBlock,
           int64_t(kWarpsPerBlock) * 2 * norm.channels * int64_t(sizeof(float)), stream, norm, gradients, partial);
}

}  // namespace

void layer_norm_forward(const LayerNorm& norm, void* y, void* sum, float* mean, float* rstd, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    with_types(norm.x_dtype, norm.y_dtype, [&](auto x_type, auto y_type) {
        with_shape(norm.channels, [&](auto shape) {
            launch_forward<typename decltype(x_type)::type, typename decltype(y_type)::type, decltype(shape)>(
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
        with_shape(norm.channels, [&](auto shape) {
            launch_backward<typename decltype(x_type)::type, typename decltype(y_type)::type, decltype(shape)>(
                norm, gradients, partial, blocks, stream);
        });
    });
    const int channels = static_cast<int>(norm.channels);
    sum_partials(partial, blocks, 2 * channels, gradients.dweight, channels, gradients.dbias, stream);
}

}  // namespace vmamba::cuda

// GELU, and its backward, which sums its result over the rows on the way: that is the gradient of the bias of the
// linear layer before, for which the whole result would be read again.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <type_traits>

#include "gelu.cuh"
#include "gelu.h"
#include "kernels.h"

namespace vmamba::cuda {
namespace {

constexpr int kPack = kGeluPack;
constexpr int kMostThreads = 384;  // whole warps for hidden widths of 2^n and of 3 * 2^n
constexpr int kResident = 2;       // such blocks to a multiprocessor

// Rows a thread has in flight.
template <typename T>
constexpr int kRows = 8 / sizeof(T);

// Neighbouring numbers as they lie in memory, loaded and stored 16 bytes at a time.
template <typename T>
struct Pack {
    static constexpr int kPieces = kPack * sizeof(T) / sizeof(uint4);
    uint4 pieces[kPieces];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) pieces[p] = reinterpret_cast<const uint4*>(from)[p];
    }
    __device__ __forceinline__ void get(float (&x)[kPack]) const {
        const auto* words = reinterpret_cast<const uint32_t*>(pieces);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            if constexpr (std::is_same_v<T, float>) {
                x[i] = __uint_as_float(words[i]);
            } else {
                const float2 pair = unpack<T>(words[i / 2]);
                x[i] = i % 2 ? pair.y : pair.x;
            }
        }
    }
    __device__ __forceinline__ void set(const float (&x)[kPack]) {
        auto* words = reinterpret_cast<uint32_t*>(pieces);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            if constexpr (std::is_same_v<T, float>) {
                words[i] = __float_as_uint(x[i]);
            } else if (i % 2) {
                words[i / 2] = pack<T>(x[i - 1], x[i]);
            }
        }
    }
    // In assembly, since the compiler would take the 16 bytes apart again.
    __device__ __forceinline__ void store(T* to) const {
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(to) + p),
                         "r"(pieces[p].x), "r"(pieces[p].y), "r"(pieces[p].z), "r"(pieces[p].w)
                         : "memory");
    }
};

template <typename T>
__device__ __forceinline__ float gelu(float x) {
    if constexpr (std::is_same_v<T, float>) {
        return x * (0.5f + 0.5f * erff(x * kInvSqrt2));
    } else {
        return gelu_fast<T>(x);
    }
}

template <typename T>
__device__ __forceinline__ float gelu_slope(float x) {
    if constexpr (std::is_same_v<T, float>) {
        return fmaf(x * kInvSqrt2Pi, expf(-0.5f * x * x), 0.5f + 0.5f * erff(x * kInvSqrt2));
    } else {
        return GeluSlope(x).slope;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kForwardThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kForwardThreads)
    forward_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t packs) {
    const int64_t first = int64_t(blockIdx.x) * kRows<T> * kForwardThreads + threadIdx.x;
    Pack<T> values[kRows<T>];
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r)
        if (first + r * kForwardThreads < packs) values[r].load(x + (first + r * kForwardThreads) * kPack);
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) {
        if (first + r * kForwardThreads >= packs) break;
        float numbers[kPack];
        values[r].get(numbers);
#pragma unroll
        for (int i = 0; i < kPack; ++i) numbers[i] = gelu<T>(numbers[i]);
        values[r].set(numbers);
        values[r].store(y + (first + r * kForwardThreads) * kPack);
    }
}

template <typename T>
void run_forward(const void* x, void* y, int64_t packs, cudaStream_t stream) {
    launch(forward_kernel<T>, ceil_div(packs, kRows<T> * kForwardThreads), kForwardThreads, 0, stream,
           static_cast<const T*>(x), static_cast<T*>(y), packs);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// How blocks cover (rows, columns): each has a tile of columns, `width` packs of each of `side` rows at a time.
struct Cover {
    int width = 1;
    int tiles = 1;
    int side = 1;
    int blocks = 1;  // to a tile
    int threads() const { return width * side; }
};

template <typename T>
Cover cover_of(const GeluBackward& gelu, int device) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
    const int64_t packs = gelu.columns / kPack;
    Cover cover;
    cover.width = balanced_tile(packs, kMostThreads, 1);
    cover.tiles = static_cast<int>(ceil_div(packs, cover.width));
    cover.side = kMostThreads / cover.width;
    const int64_t threads = int64_t(processors) * kResident * kMostThreads;
    const int64_t most = threads / round_up(cover.threads(), 32) / cover.tiles;
    const int64_t wanted = ceil_div(gelu.rows, int64_t{cover.side} * kRows<T>);
    cover.blocks = static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
    return cover;
}

// The blocks of a tile take turns through the rows and keep sums in registers; each adds its own up in order and writes
// its share of a row of `partial`, (blocks, columns).
template <typename T>
__global__ void __launch_bounds__(kMostThreads, kResident)
    backward_kernel(const __grid_constant__ GeluBackward gelu, Cover cover, float* __restrict__ partial) {
    const int tile = blockIdx.x % cover.tiles, block = blockIdx.x / cover.tiles;
    const int64_t first_column = int64_t(tile) * cover.width * kPack;
    const int64_t column = first_column + threadIdx.x % cover.width * kPack;
    const int64_t stride = cover.side * gelu.columns;
    const int64_t rows = column < gelu.columns ? gelu.rows : 0;  // the last tile may be narrower
    float sums[kPack] = {};
    for (int64_t first = int64_t(block) * cover.side * kRows<T> + threadIdx.x / cover.width; first < rows;
         first += int64_t(cover.blocks) * cover.side * kRows<T>) {
        const int64_t at = first * gelu.columns + column;
        const auto there = [&](int r) { return r * cover.side < rows - first; };
        Pack<T> grads[kRows<T>], xs[kRows<T>];
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r)
            if (there(r)) {
                grads[r].load(static_cast<const T*>(gelu.grad) + at + r * stride);
                xs[r].load(static_cast<const T*>(gelu.x) + at + r * stride);
            }
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r) {
            if (!there(r)) break;
            float x[kPack], grad[kPack];
            xs[r].get(x);
            grads[r].get(grad);
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
                grad[i] *= gelu_slope<T>(x[i]);
                sums[i] += grad[i];
            }
            grads[r].set(grad);
            grads[r].store(static_cast<T*>(gelu.dx) + at + r * stride);
        }
    }

    __shared__ float shared[kMostThreads * kPack];  // (side, width * kPack)
#pragma unroll
    for (int i = 0; i < kPack; ++i) shared[threadIdx.x * kPack + i] = sums[i];
    __syncthreads();
    const int tile_columns = static_cast<int>(min(int64_t{cover.width} * kPack, gelu.columns - first_column));
    for (int i = threadIdx.x; i < tile_columns; i += blockDim.x) {
        float total = 0.0f;
        for (int side = 0; side < cover.side; ++side) total += shared[side * cover.width * kPack + i];
        partial[block * gelu.columns + first_column + i] = total;
    }
}

template <typename T>
void run_backward(const GeluBackward& gelu, float* partial, int device, cudaStream_t stream) {
    const Cover cover = cover_of<T>(gelu, device);
    launch(backward_kernel<T>, int64_t{cover.blocks} * cover.tiles, cover.threads(), 0, stream, gelu, cover, partial);
    const int columns = static_cast<int>(gelu.columns);
    sum_partials(partial, cover.blocks, columns, gelu.dbias, columns, nullptr, stream);
}

}  // namespace

void gelu_forward(const void* x, void* y, int64_t count, Scalar dtype, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto run = dtype == Scalar::f32    ? run_forward<float>
                     : dtype == Scalar::bf16 ? run_forward<__nv_bfloat16>
                                             : run_forward<__half>;
    run(x, y, count / kPack, current_stream(device));
}

int64_t gelu_backward_workspace(const GeluBackward& gelu, int device) {
    const Cover cover = gelu.dtype == Scalar::f32 ? cover_of<float>(gelu, device) : cover_of<__half>(gelu, device);
    return cover.blocks * gelu.columns * int64_t(sizeof(float));
}

void gelu_backward(const GeluBackward& gelu, void* workspace, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    const auto run = gelu.dtype == Scalar::f32    ? run_backward<float>
                     : gelu.dtype == Scalar::bf16 ? run_backward<__nv_bfloat16>
                                                  : run_backward<__half>;
    run(gelu, static_cast<float*>(workspace), device, stream);
}

}  // namespace vmamba::cuda

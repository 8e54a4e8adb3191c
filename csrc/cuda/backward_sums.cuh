// What the two backward kernels share: sums over lanes, and the gradients of a low-rank factor as tensor-core products
// with the page's tile of step gradients.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {

// Sums `Count` values (a power of two) over the lanes at distances Top, Top / 2, ..., halving the values each time: a
// lane ends with the total of one value, whose index is spelled by its lane bits from Top down.
template <int Count, int Top>
__device__ __forceinline__ float scatter_sum(float (&value)[Count]) {
    if constexpr (Count == 1) {
        return value[0];
    } else {
        const bool upper = threadIdx.x & Top;
        float half[Count / 2];
#pragma unroll
        for (int i = 0; i < Count / 2; ++i) {
            const float mine = upper ? value[Count / 2 + i] : value[i];
            const float other = upper ? value[i] : value[Count / 2 + i];
            half[i] = mine + __shfl_xor_sync(kFullWarp, other, Top);
        }
        return scatter_sum<Count / 2, Top / 2>(half);
    }
}

// Sums over a warp's channels of two values a step, for eight steps: butterflies of all sixteen.
template <typename T>
class ChannelSums {
  public:
    __device__ __forceinline__ void add(int i, float first, float second) {
        values_[i] = first;
        values_[8 + i] = second;
    }
    // Into sums (steps, warps, 2), from step t on.
    __device__ __forceinline__ void store(float* sums, int t, int warp, int warps) {
        // Lane bits from 16 down to 2 spell the first or second value, then the step.
        const int lane = threadIdx.x % 32;
        float total = scatter_sum<16, 16>(values_);
        total += __shfl_xor_sync(kFullWarp, total, 1);
        if (lane % 2 == 0) sums[((t + lane / 2 % 8) * warps + warp) * 2 + lane / 16] = total;
    }

  private:
    float values_[16];
};

// The same for bfloat16, rounded and then added up by two tensor-core products: a lane's values of four steps are its
// part of one operand, the other picks of each pair of rows its first or its second value into a column.
template <>
class ChannelSums<__nv_bfloat16> {
  public:
    __device__ ChannelSums() {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) pick_[i] = g == 2 * i ? 0x3f80u : g == 2 * i + 1 ? 0x3f800000u : 0u;  // ones
    }
    __device__ __forceinline__ void add(int i, float first, float second) {
        values_[i] = pack<__nv_bfloat16>(first, second);
    }
    __device__ __forceinline__ void store(float* sums, int t, int warp, int warps) {
        float acc[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            mma_bf16(acc, values_[i], values_[i + 2], values_[i + 1], values_[i + 3], pick_[i / 2], pick_[i / 2 + 1]);
        // Columns 4 h and 4 h + 1 of rows g and g + 8 are of steps 4 h and 4 h + 2, the next two columns of those
        // behind them. Rows that are eight apart are a lane's: bits 16 and 8 spell which of its four sums it ends with.
        const int lane = threadIdx.x % 32;
        float total = scatter_sum<4, 16>(acc);
        total += __shfl_xor_sync(kFullWarp, total, 4);
        const int step = t + lane / 2 % 2 * 4 + lane / 16 * 2 + lane % 2;
        if (lane / 4 % 2 == 0) sums[(step * warps + warp) * 2 + lane / 8 % 2] = total;
    }

  private:
    uint32_t values_[8], pick_[4];
};

// Gradients of the weights from a page: step gradients (steps x channels), transposed, times rows (steps x rank). They
// add up over pages in the block's rows of parameter gradients, (rank, D), always by the same thread.
template <bool Exact>
__device__ void add_weight_grads(float* weight_grads, int64_t channels_left, int64_t channels, bool first_page,
                                 const float* delta, int stride, const float* low, int rank, int tile, int count) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, row_stride = rank_stride(rank);
    const int columns = rank_columns(rank) / 8, units = tile / 16 * columns;
    for (int unit = threadIdx.x / 32; unit < units; unit += blockDim.x / 32) {
        const int c = unit / columns * 16, r = unit % columns * 8;
        float acc[4] = {}, before[4] = {};
        float* to[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int channel = c + g + i / 2 * 8, column = r + 2 * q + i % 2;
            to[i] = channel < channels_left && column < rank ? weight_grads + column * channels + channel : nullptr;
            if (to[i] && !first_page) before[i] = *to[i];
        }
        for (int t = 0; t < count; t += 8) {
            const float* dx = delta + (t + q) * stride + c + g;
            const float a[4] = {dx[0], dx[8], dx[4 * stride], dx[4 * stride + 8]};
            const float* row = low + (t + q) * row_stride + r + g;
            const float b[2] = {row[0], row[4 * row_stride]};
            mma<Exact, false, !Exact>(acc, a, b);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (to[i]) *to[i] = before[i] + acc[i];
    }
}

// Gradients of a page's low-rank rows: step gradients (steps x channels) times weights (channels x rank).
template <bool Exact>
__device__ void store_row_grads(float* rows, int64_t features, const float* delta, int stride, const float* weights,
                                int rank, int tile, int count) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, row_stride = rank_stride(rank);
    const int columns = rank_columns(rank) / 8, units = (count + 15) / 16 * columns;
    for (int unit = threadIdx.x / 32; unit < units; unit += blockDim.x / 32) {
        const int t = unit / columns * 16, r = unit % columns * 8;
        float acc[4] = {};
        for (int c = 0; c < tile; c += 8) {
            const float* dx = delta + (t + g) * stride + c + q;
            const float a[4] = {dx[0], dx[8 * stride], dx[4], dx[8 * stride + 4]};
            const float* weight = weights + (c + q) * row_stride + r + g;
            const float b[2] = {weight[0], weight[4 * row_stride]};
            mma<Exact, false, !Exact>(acc, a, b);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int step = t + g + i / 2 * 8, column = r + 2 * q + i % 2;
            if (step < count && column < rank) rows[step * features + column] = acc[i];
        }
    }
}

}  // namespace vmamba::cuda

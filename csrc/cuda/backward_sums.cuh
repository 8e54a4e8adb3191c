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

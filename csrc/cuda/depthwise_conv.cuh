// The kernels of the depthwise convolution. A thread holds a pack of channels of a strip: of some neighbouring columns
// of one row, so that what it loads and converts serves several taps, and every tap is a product in registers. The
// weights of a block's channels lie in shared memory as floats, in the order in which the taps lie on the map.
#pragma once

#include <cstring>

#include "depthwise_conv_kernels.h"
#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Packs of channels
// ---------------------------------------------------------------------------------------------------------------------

template <int Bytes>
struct RawBits;
template <>
struct RawBits<16> {
    using type = uint4;
};
template <>
struct RawBits<8> {
    using type = uint2;
};
template <>
struct RawBits<4> {
    using type = uint32_t;
};
template <>
struct RawBits<2> {
    using type = uint16_t;
};

// Neighbouring channels as they lie in memory. All bits zero are zeros in every dtype.
template <typename T, int V>
struct Pack {
    typename RawBits<V * sizeof(T)>::type bits{};

    __device__ __forceinline__ void load(const T* from) {
        bits = *reinterpret_cast<const typename RawBits<V * sizeof(T)>::type*>(from);
    }
    __device__ __forceinline__ void to_floats(float (&to)[V]) const {
        if constexpr (std::is_same_v<T, __nv_bfloat16> && V % 2 == 0) {  // the upper half of a float, each
            uint32_t pairs[V / 2];
            memcpy(pairs, &bits, sizeof(pairs));
#pragma unroll
            for (int v = 0; v < V; v += 2) {
                to[v] = __uint_as_float(pairs[v / 2] << 16);
                to[v + 1] = __uint_as_float(pairs[v / 2] & 0xffff0000u);
            }
        } else {
            T values[V];
            memcpy(values, &bits, sizeof(values));
#pragma unroll
            for (int v = 0; v < V; ++v) to[v] = to_float(values[v]);
        }
    }
};

template <typename T, int V>
__device__ __forceinline__ void store_pack(T* to, const float (&from)[V]) {
    T values[V];
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = from_float<T>(from[v]);
    Pack<T, V> pack;
    memcpy(&pack.bits, values, sizeof(values));
    *reinterpret_cast<typename RawBits<V * sizeof(T)>::type*>(to) = pack.bits;
}

template <int V>
__device__ __forceinline__ void load_weights(const float* from, float (&to)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = from[v];
}
template <>
__device__ __forceinline__ void load_weights<4>(const float* from, float (&to)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

template <int V>
__device__ __forceinline__ void add_product(float (&sum)[V], const float (&a)[V], const float (&b)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = fmaf(a[v], b[v], sum[v]);
}

template <int N, int V>
__device__ __forceinline__ void clear(float (&sums)[N][V]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int v = 0; v < V; ++v) sums[n][v] = 0.0f;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-x * kLog2e)); }

// ---------------------------------------------------------------------------------------------------------------------
// Places
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool outside(int position, int size) {
    return static_cast<unsigned>(position) >= static_cast<unsigned>(size);
}

template <typename T>
__device__ __forceinline__ T* map_at(const ConvMap& map, int64_t image, int direction, int channel) {
    return static_cast<T*>(map.data) + image * map.image_stride + direction * map.direction_stride + channel;
}

// A product of 32 bits: one instruction, where one of 64 bits takes several.
__device__ __forceinline__ const char* column_at(const char* row, uint32_t column_bytes, int column) {
    return row + static_cast<int64_t>(column) * static_cast<int32_t>(column_bytes);
}

template <typename T>
__device__ __forceinline__ T* column_at(T* row, const ConvMap& map, int column) {
    return const_cast<T*>(reinterpret_cast<const T*>(
        column_at(reinterpret_cast<const char*>(row), map.column_stride * sizeof(T), column)));
}

// What a thread works on. Of the grid: tile, direction and chunk; of the block: lane and group.
template <int V>
struct ConvPlace {
    int direction, channel, block_channels;
    int64_t tile;

    __device__ ConvPlace(const ConvLayout& layout, int directions) {
        const uint32_t chunk = blockIdx.x % layout.chunks, block = blockIdx.x / layout.chunks;
        direction = block % directions;
        tile = block / directions;
        block_channels = layout.lanes * V;
        channel = chunk * block_channels + threadIdx.x * V;
    }
};

template <int Columns>
struct ConvStrip {
    int image, row, column;

    __device__ __forceinline__ ConvStrip(uint32_t index, const ConvLayout& layout) {
        const uint32_t line = divide(index, layout.row_strips);
        column = static_cast<int>(index - line * layout.row_strips.by) * Columns;
        image = static_cast<int>(divide(line, layout.rows));
        row = static_cast<int>(line - image * layout.rows.by);
    }
};

// Writes one direction's (taps, block channels). Groups share the taps, lanes the channels, which takes no divisions.
template <int V>
__device__ __forceinline__ void stage_weights(const Filter& filter, int direction, const ConvPlace<V>& place,
                                              float* shared) {
    const int taps = filter.taps();
    for (int tap = threadIdx.y; tap < taps; tap += blockDim.y) {
        const int source = filter.mirrored[direction] ? taps - 1 - tap : tap;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int channel = place.channel + v;
            float weight = 0.0f;
            if (channel < filter.channels)
                weight = load_as(filter.weight, (int64_t(direction) * filter.channels + channel) * taps + source,
                                 filter.dtype);
            shared[tap * place.block_channels + threadIdx.x * V + v] = tap == filter.centre ? weight + 1.0f : weight;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels of a known size: strips of R columns
// ---------------------------------------------------------------------------------------------------------------------

// N packs of a row, from column `first` on, `step` columns apart; zeros beyond its ends.
template <int N, typename T, int V>
__device__ __forceinline__ void load_columns(Pack<T, V> (&packs)[N], const T* row, const ConvMap& map, int first,
                                             int step = 1) {
    const int64_t bytes = static_cast<int64_t>(map.column_stride) * step * int64_t(sizeof(T));
    const char* from = column_at(reinterpret_cast<const char*>(row), map.column_stride * sizeof(T), first);
#pragma unroll
    for (int t = 0; t < N; ++t, from += bytes) {
        packs[t] = Pack<T, V>{};
        if (!outside(first + t * step, map.width)) packs[t].load(reinterpret_cast<const T*>(from));
    }
}

// The same of a row that goes on beyond its ends as it ended.
template <int N, typename T, int V>
__device__ __forceinline__ void load_replicated(Pack<T, V> (&packs)[N], const T* row, const ConvMap& map, int first,
                                                int step) {
#pragma unroll
    for (int t = 0; t < N; ++t) packs[t].load(column_at(row, map, min(max(first + t * step, 0), map.width - 1)));
}

// With strips of one column, for any dilation and either padding.
template <int KH, int KW, int S, int R>
struct Fixed {
    static constexpr bool kSpread = R == 1;
    static constexpr int kColumns = R;
    static constexpr int kGathered = kSpread ? 1 : 4;     // columns of a strip of the gradient
    static constexpr int kReach = (R - 1) * S + KW;       // columns that a strip reads
    static constexpr int kRowsAtOnce = KH <= 3 ? KH : 1;  // more would not fit the instruction cache, or the registers
    // Blocks of a multiprocessor that registers should suffice for.
    static constexpr int kBlocks = KW <= 4 && S == 1 ? 3 : 2, kBackwardBlocks = kSpread ? 3 : 2;

    // What row i of the taps reads, for a strip that begins at (row, column); whether there is something.
    template <typename T, int V>
    static __device__ __forceinline__ bool load(Pack<T, V> (&packs)[kReach], const T* image, const ConvMap& map,
                                                const Filter& filter, int direction, int row, int column, int i) {
        int y = row * S - filter.top[direction] + i * (kSpread ? filter.dilation_height : 1);
        const int left = column * S - filter.left[direction];
        if constexpr (kSpread) {
            if (filter.replicate) y = min(max(y, 0), map.height - 1);
        }
        if (outside(y, map.height)) return false;
        const T* line = image + y * map.row_stride;
        if constexpr (kSpread) {
            if (filter.replicate) {
                load_replicated(packs, line, map, left, filter.dilation_width);
            } else {
                load_columns(packs, line, map, left, filter.dilation_width);
            }
        } else {
            load_columns(packs, line, map, left);
        }
        return true;
    }

    // The sums of a strip, of what the filter makes of a map of one image.
    template <typename T, int V>
    static __device__ __forceinline__ void convolve(float (&sums)[R][V], const T* image, const ConvMap& map,
                                                    const Filter& filter, int direction, int row, int column,
                                                    const float* weights, int pitch) {
#pragma unroll kRowsAtOnce
        for (int i = 0; i < KH; ++i) {
            Pack<T, V> packs[kReach];
            if (!load(packs, image, map, filter, direction, row, column, i)) continue;
            float w[KW][V];
#pragma unroll
            for (int j = 0; j < KW; ++j) load_weights(weights + (i * KW + j) * pitch, w[j]);
#pragma unroll
            for (int t = 0; t < kReach; ++t) {
                float x[V];
                packs[t].to_floats(x);
#pragma unroll
                for (int r = 0; r < R; ++r)
                    if (t - r * S >= 0 && t - r * S < KW) add_product(sums[r], x, w[t - r * S]);
            }
        }
    }

    static constexpr int kShares = KH / kRowsAtOnce;  // threads that have the taps of one strip
    static int parts(const Filter&, int groups) { return groups / kShares; }

    // Sums of products with some rows of the taps; several parts of the strips make up a block.
    template <int V>
    struct Gradient {
        float sums[kRowsAtOnce][KW][V], bias[1][V];
        int parts, first_row, part;

        __device__ Gradient(const Filter&, int group, int groups)
            : parts(groups / kShares), first_row(group / parts * kRowsAtOnce), part(group % parts) {
#pragma unroll
            for (int i = 0; i < kRowsAtOnce; ++i) clear(sums[i]);
            clear(bias);
        }

        template <typename T>
        __device__ __forceinline__ void add(const T* image, const ConvMap& x, const T* grads, const ConvMap& dz,
                                            const Filter& filter, int direction, int row, int column) {
            Pack<T, V> grad_packs[R];
            load_columns(grad_packs, grads + row * dz.row_stride, dz, column);
            float grad[R][V];
#pragma unroll
            for (int r = 0; r < R; ++r) grad_packs[r].to_floats(grad[r]);
            if (first_row == 0)
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int v = 0; v < V; ++v) bias[0][v] += grad[r][v];
#pragma unroll
            for (int i = 0; i < kRowsAtOnce; ++i) {
                Pack<T, V> packs[kReach];
                if (!load(packs, image, x, filter, direction, row, column, first_row + i)) continue;
#pragma unroll
                for (int t = 0; t < kReach; ++t) {
                    float value[V];
                    packs[t].to_floats(value);
#pragma unroll
                    for (int r = 0; r < R; ++r)
                        if (t - r * S >= 0 && t - r * S < KW) add_product(sums[i][t - r * S], value, grad[r]);
                }
            }
        }

        __device__ bool works(const Filter&) const { return first_row < KH; }

        // (parts, taps and bias, pitch)
        __device__ void write(const Filter& filter, float* shared, int pitch) const {
            if (!works(filter)) return;
            shared += part * (KH * KW + 1) * pitch;
#pragma unroll
            for (int i = 0; i < kRowsAtOnce; ++i)
#pragma unroll
                for (int j = 0; j < KW; ++j)
#pragma unroll
                    for (int v = 0; v < V; ++v) shared[((first_row + i) * KW + j) * pitch + v] = sums[i][j][v];
#pragma unroll
            for (int v = 0; v < V; ++v)
                if (first_row == 0) shared[KH * KW * pitch + v] = bias[0][v];
        }
    };

    // For a stride of two, a square kernel padded to keep the grid: the gradient of a strip of kGathered columns.
    static bool gathers(const Filter& filter) {
        return S == 2 && KH == KW && filter.directions == 1 && filter.top[0] == KH / 2 && filter.left[0] == KW / 2;
    }
    template <typename T, int V>
    static __device__ __forceinline__ void gather(float (&sums)[kGathered][V], const T* image, const ConvMap& dz,
                                                  const ConvMap&, const Filter&, int, int row, int column,
                                                  const float* weights, int pitch) {
        constexpr int kPad = KW / 2, kBefore = kPad / 2, kGrads = (kGathered - 1 + kPad) / 2 + kBefore + 1;
#pragma unroll 1
        for (int i = (row + kPad) % 2; i < KH; i += 2) {
            const int y = (row + kPad - i) / 2;
            if (row + kPad < i || y >= dz.height) continue;
            Pack<T, V> packs[kGrads];
            load_columns(packs, image + y * dz.row_stride, dz, column / 2 - kBefore);
            float w[KW][V];
#pragma unroll
            for (int j = 0; j < KW; ++j) load_weights(weights + (i * KW + j) * pitch, w[j]);
#pragma unroll
            for (int t = 0; t < kGrads; ++t) {
                float grad[V];
                packs[t].to_floats(grad);
#pragma unroll
                for (int r = 0; r < kGathered; ++r) {
                    constexpr int kShift = kPad + 2 * kBefore;
                    const int j = r + kShift - 2 * t;
                    if (j >= 0 && j < KW) add_product(sums[r], grad, w[j]);
                }
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Any other kernel, position by position
// ---------------------------------------------------------------------------------------------------------------------

struct AnySize {
    static constexpr int kColumns = 1, kGathered = 1, kBlocks = 3, kBackwardBlocks = 3;

    // Where a tap looks along one axis; whether there is something.
    static __device__ __forceinline__ bool look(int& position, int size, bool replicate) {
        if (replicate) position = min(max(position, 0), size - 1);
        return !outside(position, size);
    }

    template <typename T, int V>
    static __device__ void convolve(float (&sums)[1][V], const T* image, const ConvMap& map, const Filter& filter,
                                    int direction, int row, int column, const float* weights, int pitch) {
        for (int i = 0; i < filter.height; ++i) {
            int y = row * filter.stride_height - filter.top[direction] + i * filter.dilation_height;
            if (!look(y, map.height, filter.replicate)) continue;
            const T* line = image + y * map.row_stride;
            for (int j = 0; j < filter.width; ++j) {
                int x = column * filter.stride_width - filter.left[direction] + j * filter.dilation_width;
                if (!look(x, map.width, filter.replicate)) continue;
                Pack<T, V> pack;
                pack.load(column_at(line, map, x));
                float value[V], w[V];
                pack.to_floats(value);
                load_weights(weights + (i * filter.width + j) * pitch, w);
                add_product(sums[0], value, w);
            }
        }
    }

    static int parts(const Filter& filter, int groups) { return groups / std::min(filter.taps(), groups); }

    // A thread has every so manieth tap; several parts of the positions make up a block where taps are few.
    template <int V>
    struct Gradient {
        static constexpr int kMost = 8;  // taps of a thread
        float sums[kMost][V], bias[1][V];
        int slots, parts, slot, part;

        __device__ Gradient(const Filter& filter, int group, int groups)
            : slots(min(filter.taps(), groups)), parts(groups / slots), slot(group / parts), part(group % parts) {
            clear(sums);
            clear(bias);
        }

        template <typename T>
        __device__ void add(const T* image, const ConvMap& x, const T* grads, const ConvMap& dz, const Filter& filter,
                            int direction, int row, int column) {
            Pack<T, V> pack;
            pack.load(column_at(grads + row * dz.row_stride, dz, column));
            float grad[V];
            pack.to_floats(grad);
            if (slot == 0)
#pragma unroll
                for (int v = 0; v < V; ++v) bias[0][v] += grad[v];
#pragma unroll
            for (int m = 0; m < kMost; ++m) {
                const int tap = slot + m * slots;
                if (tap >= filter.taps()) break;
                const int i = tap / filter.width, j = tap - i * filter.width;
                int y = row * filter.stride_height - filter.top[direction] + i * filter.dilation_height;
                int column_x = column * filter.stride_width - filter.left[direction] + j * filter.dilation_width;
                if (!look(y, x.height, filter.replicate) || !look(column_x, x.width, filter.replicate)) continue;
                pack.load(column_at(image + y * x.row_stride, x, column_x));
                float value[V];
                pack.to_floats(value);
                add_product(sums[m], value, grad);
            }
        }

        __device__ bool works(const Filter&) const { return slot < slots; }

        __device__ void write(const Filter& filter, float* shared, int pitch) const {
            if (!works(filter)) return;
            shared += part * (filter.taps() + 1) * pitch;
#pragma unroll
            for (int m = 0; m < kMost; ++m)
                if (slot + m * slots < filter.taps())
#pragma unroll
                    for (int v = 0; v < V; ++v) shared[(slot + m * slots) * pitch + v] = sums[m][v];
#pragma unroll
            for (int v = 0; v < V; ++v)
                if (slot == 0) shared[filter.taps() * pitch + v] = bias[0][v];
        }
    };

    // The positions of the result that a tap, looking `offset` away, shows a position: first to last.
    struct Range {
        int first, last;
        __device__ __forceinline__ Range(int position, int offset, int stride, int size, int out_size, bool replicate) {
            const int start = position - offset;
            first = last = stride == 1 ? start : start / stride;
            if (start < 0 || first * stride != start) first = 0, last = -1;
            if (replicate) {  // of unit stride: the border is also seen by whatever looks beyond it
                first = position == 0 ? 0 : start;
                last = position == size - 1 ? out_size - 1 : start;
            }
            first = max(first, 0);
            last = min(last, out_size - 1);
        }
    };

    template <typename T, int V>
    static __device__ void gather(float (&sums)[1][V], const T* image, const ConvMap& dz, const ConvMap& dx,
                                  const Filter& filter, int direction, int row, int column, const float* weights,
                                  int pitch) {
        for (int i = 0; i < filter.height; ++i) {
            const Range rows(row, i * filter.dilation_height - filter.top[direction], filter.stride_height, dx.height,
                             dz.height, filter.replicate);
            for (int j = 0; j < filter.width; ++j) {
                const Range columns(column, j * filter.dilation_width - filter.left[direction], filter.stride_width,
                                    dx.width, dz.width, filter.replicate);
                float w[V];
                load_weights(weights + (i * filter.width + j) * pitch, w);
                for (int y = rows.first; y <= rows.last; ++y)
                    for (int x = columns.first; x <= columns.last; ++x) {
                        Pack<T, V> pack;
                        pack.load(column_at(image + y * dz.row_stride, dz, x));
                        float grad[V];
                        pack.to_floats(grad);
                        add_product(sums[0], grad, w);
                    }
            }
        }
    }
};

// The gradient of a map whose border was replicated, by a kernel of unit strides. Away from the border it is a
// convolution like any other.
template <int KH, int KW>
struct Replicated {
    static constexpr int kGathered = 1, kBlocks = 3;

    template <typename T, int V>
    static __device__ __forceinline__ void gather(float (&sums)[1][V], const T* image, const ConvMap& dz,
                                                  const ConvMap& dx, const Filter& filter, int direction, int row,
                                                  int column, const float* weights, int pitch) {
        const bool inner = row > 0 && row < dx.height - 1 && column > 0 && column < dx.width - 1;
        if (!inner) return AnySize::gather(sums, image, dz, dx, filter, direction, row, column, weights, pitch);
#pragma unroll
        for (int i = 0; i < KH; ++i) {
            const int y = row + filter.top[direction] - i * filter.dilation_height;
            if (outside(y, dz.height)) continue;
            Pack<T, V> packs[KW];
            load_columns(packs, image + y * dz.row_stride, dz, column + filter.left[direction], -filter.dilation_width);
#pragma unroll
            for (int j = 0; j < KW; ++j) {
                float grad[V], w[V];
                packs[j].to_floats(grad);
                load_weights(weights + (i * KW + j) * pitch, w);
                add_product(sums[0], grad, w);
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

template <typename T, int V, int N>
__device__ __forceinline__ void store_columns(const ConvMap& map, const ConvStrip<N>& strip, int direction, int channel,
                                              const float (&values)[N][V]) {
    T* row = map_at<T>(map, strip.image, direction, channel) + strip.row * map.row_stride;
#pragma unroll
    for (int r = 0; r < N; ++r)
        if (strip.column + r < map.width) store_pack(column_at(row, map, strip.column + r), values[r]);
}

template <int V, int N>
__device__ __forceinline__ void add_bias(float (&sums)[N][V], const Filter& filter, int direction, int channel) {
    if (!filter.bias) return;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const float bias = load_as(filter.bias, int64_t(direction) * filter.channels + channel + v, filter.dtype);
#pragma unroll
        for (int r = 0; r < N; ++r) sums[r][v] += bias;
    }
}

template <typename T, int V, typename Size>
__global__ void __launch_bounds__(ConvLayout::kThreads, Size::kBlocks)
    conv_forward_kernel(const __grid_constant__ ConvForward task, const __grid_constant__ ConvLayout layout) {
    constexpr int N = Size::kColumns;
    extern __shared__ float shared[];  // (directions summed over, taps, pitch)
    const ConvPlace<V> place(layout, task.sums ? 1 : task.filter.directions);
    const int first = task.sums ? 0 : place.direction, count = task.sums ? task.filter.directions : 1;
    const int pitch = place.block_channels, weights = task.filter.taps() * pitch;
    for (int k = 0; k < count; ++k) stage_weights(task.filter, first + k, place, shared + k * weights);
    __syncthreads();

    const int64_t index = place.tile * layout.groups + threadIdx.y;
    if (index >= layout.strips || place.channel >= task.filter.channels) return;
    const ConvStrip<N> strip(static_cast<uint32_t>(index), layout);
    float sums[N][V];
    clear(sums);
    for (int k = 0; k < count; ++k)
        Size::convolve(sums, map_at<const T>(task.source, strip.image, first + k, place.channel), task.source,
                       task.filter, first + k, strip.row, strip.column, shared + k * weights + threadIdx.x * V, pitch);
    add_bias(sums, task.filter, place.direction, place.channel);
    if (task.silu)
#pragma unroll
        for (int r = 0; r < N; ++r)
#pragma unroll
            for (int v = 0; v < V; ++v) sums[r][v] *= sigmoid(sums[r][v]);
    store_columns<T>(task.target, strip, place.direction, place.channel, sums);
}

// dz = dy * silu'(z) of a strip, z being convolved anew.
template <typename T, int V, typename Size>
__device__ __forceinline__ void write_dz(const ConvBackward& task, const ConvLayout& layout, const ConvPlace<V>& place,
                                         int64_t index, const float* weights) {
    constexpr int N = Size::kColumns;
    if (index >= layout.strips || place.channel >= task.filter.channels) return;
    const ConvStrip<N> strip(static_cast<uint32_t>(index), layout);
    float sums[N][V];
    clear(sums);
    Size::convolve(sums, map_at<const T>(task.x, strip.image, 0, place.channel), task.x, task.filter, place.direction,
                   strip.row, strip.column, weights + threadIdx.x * V, place.block_channels);
    add_bias(sums, task.filter, place.direction, place.channel);
    const T* grads = map_at<const T>(task.dy, strip.image, place.direction, place.channel);
    Pack<T, V> packs[N];
    load_columns(packs, grads + strip.row * task.dy.row_stride, task.dy, strip.column);
#pragma unroll
    for (int r = 0; r < N; ++r) {
        float grad[V];
        packs[r].to_floats(grad);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float z = sums[r][v], s = sigmoid(z);
            sums[r][v] = grad[v] * s * fmaf(z, 1.0f - s, 1.0f);
        }
    }
    store_columns<T>(task.dz, strip, place.direction, place.channel, sums);
}

// A block takes every so manieth tile of its chunk. Where there is a SiLU it first writes the tile's dz, which it then
// reads back from the cache like any other.
template <typename T, int V, typename Size>
__global__ void __launch_bounds__(ConvLayout::kThreads, Size::kBackwardBlocks)
    conv_backward_kernel(const __grid_constant__ ConvBackward task, const __grid_constant__ ConvLayout layout) {
    extern __shared__ float shared[];  // weights: (taps, pitch); behind them (parts, taps and bias, channels)
    const ConvPlace<V> place(layout, task.filter.directions);
    const int taps = task.filter.taps();
    if (task.silu) {
        stage_weights(task.filter, place.direction, place, shared);
        __syncthreads();
    }
    typename Size::template Gradient<V> gradient(task.filter, threadIdx.y, layout.groups);
    const bool works = gradient.works(task.filter) && place.channel < task.filter.channels;
    for (int64_t tile = place.tile; tile < layout.tiles; tile += task.blocks) {
        const int64_t first = tile * layout.groups;
        if (task.silu) {
            write_dz<T, V, Size>(task, layout, place, first + threadIdx.y, shared);
            __syncthreads();
        }
        const int64_t behind = works ? min(first + layout.groups, layout.strips) : first;
        for (int64_t index = first + gradient.part; index < behind; index += gradient.parts) {
            const ConvStrip<Size::kColumns> strip(static_cast<uint32_t>(index), layout);
            gradient.add(map_at<const T>(task.x, strip.image, 0, place.channel), task.x,
                         map_at<const T>(task.dz, strip.image, place.direction, place.channel), task.dz, task.filter,
                         place.direction, strip.row, strip.column);
        }
    }
    float* parts = shared + taps * place.block_channels;
    gradient.write(task.filter, parts + threadIdx.x * V, place.block_channels);
    __syncthreads();
    const int size = (taps + 1) * place.block_channels;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < size; i += blockDim.x * blockDim.y) {
        float total = 0.0f;
        for (int part = 0; part < gradient.parts; ++part) total += parts[part * size + i];
        task.partial[int64_t(blockIdx.x) * size + i] = total;
    }
}

template <typename T, int V, typename Size>
__global__ void __launch_bounds__(ConvLayout::kThreads, Size::kBlocks)
    conv_gather_kernel(const __grid_constant__ ConvGather task, const __grid_constant__ ConvLayout layout) {
    constexpr int N = Size::kGathered;
    extern __shared__ float shared[];  // (directions, taps, pitch)
    const ConvPlace<V> place(layout, 1);
    const int pitch = place.block_channels, weights = task.filter.taps() * pitch;
    for (int k = 0; k < task.filter.directions; ++k) stage_weights(task.filter, k, place, shared + k * weights);
    __syncthreads();
    const int64_t index = place.tile * layout.groups + threadIdx.y;
    if (index >= layout.strips || place.channel >= task.filter.channels) return;
    const ConvStrip<N> strip(static_cast<uint32_t>(index), layout);
    float sums[N][V];
    clear(sums);
    for (int k = 0; k < task.filter.directions; ++k)
        Size::gather(sums, map_at<const T>(task.dz, strip.image, k, place.channel), task.dz, task.dx, task.filter, k,
                     strip.row, strip.column, shared + k * weights + threadIdx.x * V, pitch);
    store_columns<T>(task.dx, strip, 0, place.channel, sums);
}

// ---------------------------------------------------------------------------------------------------------------------
// Choice of kernel
// ---------------------------------------------------------------------------------------------------------------------

// Calls `f` with the number of channels in a pack and the size, as compile-time constants: the sizes models have.
template <typename F>
void with_size(const Filter& filter, bool packed, const F& f) {
    using Four = std::integral_constant<int, 4>;
    const bool plain = filter.dilation_height == 1 && filter.dilation_width == 1 && !filter.replicate;
    const auto is = [&](int height, int width, int stride, bool any = false) {
        return filter.height == height && filter.width == width && filter.stride_height == stride &&
               filter.stride_width == stride && (plain || any);
    };
    if (!packed) return f(std::integral_constant<int, 1>{}, AnySize{});
    if (is(3, 3, 1)) return f(Four{}, Fixed<3, 3, 1, 7>{});
    if (is(3, 3, 2)) return f(Four{}, Fixed<3, 3, 2, 7>{});
    if (is(7, 7, 1)) return f(Four{}, Fixed<7, 7, 1, 7>{});
    if (is(7, 7, 2)) return f(Four{}, Fixed<7, 7, 2, 7>{});
    if (is(3, 3, 1, true)) return f(Four{}, Fixed<3, 3, 1, 1>{});
    if (is(1, 4, 1)) return f(Four{}, Fixed<1, 4, 1, 7>{});
    f(Four{}, AnySize{});
}

template <typename Task>
void launch_conv(void (*kernel)(Task, ConvLayout), int64_t blocks, int64_t shared_floats, const Task& task,
                 const ConvLayout& layout, cudaStream_t stream) {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), dim3(layout.lanes, layout.groups), shared_floats * sizeof(float), stream>>>(
        task, layout);
    check(cudaGetLastError());
}

template <typename T>
void conv_forward(const ConvForward& task, bool packed, cudaStream_t stream) {
    with_size(task.filter, packed, [&](auto pack, auto size) {
        using Size = decltype(size);
        constexpr int V = decltype(pack)::value;
        const ConvLayout layout(task.target, task.batch, task.filter.channels, V, Size::kColumns);
        const int results = task.sums ? 1 : task.filter.directions, summed = task.sums ? task.filter.directions : 1;
        launch_conv(conv_forward_kernel<T, V, Size>, layout.tiles * results * layout.chunks,
                    int64_t(summed) * task.filter.taps() * layout.lanes * V, task, layout, stream);
    });
}

template <typename T>
void conv_backward(const ConvBackward& task, bool packed, cudaStream_t stream) {
    with_size(task.filter, packed, [&](auto pack, auto size) {
        using Size = decltype(size);
        constexpr int V = decltype(pack)::value;
        const ConvLayout layout(task.dz, task.batch, task.filter.channels, V, Size::kColumns);
        const int taps = task.filter.taps(), channels = layout.lanes * V;
        const int parts = Size::parts(task.filter, layout.groups);
        launch_conv(conv_backward_kernel<T, V, Size>, task.blocks * task.filter.directions * layout.chunks,
                    int64_t(taps) * channels + int64_t(parts) * (taps + 1) * channels, task, layout, stream);
    });
}

template <typename T>
void conv_gather(const ConvGather& task, bool packed, cudaStream_t stream) {
    const auto run = [&](auto pack, auto size) {
        using Size = decltype(size);
        constexpr int V = decltype(pack)::value;
        const ConvLayout layout(task.dx, task.batch, task.filter.channels, V, Size::kGathered);
        launch_conv(conv_gather_kernel<T, V, Size>, layout.tiles * layout.chunks,
                    int64_t(task.filter.directions) * task.filter.taps() * layout.lanes * V, task, layout, stream);
    };
    with_size(task.filter, packed, [&](auto pack, auto size) {
        using Size = decltype(size);
        if constexpr (std::is_same_v<Size, Fixed<3, 3, 2, 7>> || std::is_same_v<Size, Fixed<7, 7, 2, 7>>) {
            if (Size::gathers(task.filter)) return run(pack, size);
        }
        if constexpr (std::is_same_v<Size, Fixed<3, 3, 1, 1>>) {
            if (task.filter.replicate) return run(pack, Replicated<3, 3>{});
        }
        run(pack, AnySize{});
    });
}

}  // namespace vmamba::cuda

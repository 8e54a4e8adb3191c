// What the one-state backward keeps of a page beside the tables: low-rank rows, the weights that expand them, steps and
// then step gradients, and the tensor-core products of these. In float32 and float16 all are floats, multiplied in
// tf32; in bfloat16 they are 16 bits wide, which takes a quarter of the instructions.
//
// delta holds the steps of a page, a row of floats each; a thread has a column. keep() puts a step's gradients in their
// place, two steps at a time.
#pragma once

#include "backward_sums.cuh"

namespace vmamba::cuda {

template <typename T>
class FloatPage {
  public:
    using Low = float;
    static constexpr bool kPacked = false;

    __device__ FloatPage(float* shared, const BackwardShared& layout, int rank, int tile)
        : low(shared + layout.low),
          delta(shared + layout.delta),
          stride(delta_stride(tile)),
          weights_(shared + layout.weights),
          rank_(rank),
          tile_(tile) {}

    __device__ int low_stride() const { return rank_stride(rank_); }

    __device__ void stage_weights(const Scan& s, int direction, int first_channel) const {
        cuda::stage_weights<kExact>(weights_, s, direction, first_channel, tile_);
    }

    __device__ void stage_rows(const PageStore<Low>& page, const Scan& s, int64_t image, int direction, bool) const {
        cuda::stage_rows<T, 1>(page, low_stride(), s, image, direction, 0, kLn2);
    }

    __device__ void expand(const PageStore<Low>& page, const Scan& s, int64_t image, int direction, int first_channel,
                           int count) const {
        const int warp_channel = threadIdx.x / 32 * 32;
        expand_steps<T, 32>(delta, stride, page, weights_, s, image, direction, first_channel, warp_channel, count);
    }

    __device__ __forceinline__ void keep(int t, int column, float first, float second) const {
        delta[t * stride + column] = first;
        delta[(t + 1) * stride + column] = second;
    }
    __device__ T kept(int t, int column) const { return from_float<T>(delta[t * stride + column]); }

    __device__ void store_row_grads(float* rows, int64_t features, int count) const {
        cuda::store_row_grads<kExact>(rows, features, delta, stride, weights_, rank_, tile_, count);
    }
    __device__ void add_weight_grads(float* weight_grads, int64_t channels_left, int64_t channels, bool first_page,
                                     int count) const {
        cuda::add_weight_grads<kExact>(weight_grads, channels_left, channels, first_page, delta, stride, low, rank_,
                                       tile_, count);
    }

    float* low;
    float* delta;
    int stride;  // of delta

  private:
    static constexpr bool kExact = std::is_same_v<T, float>;
    float* weights_;
    int rank_, tile_;
};

// Four 8x8 matrices of 16-bit numbers in shared memory, of which this lane names a row of one; as operands of mma_bf16,
// Transposed if their rows are the products' inner dimension.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const __nv_bfloat16* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(address)
                     : "memory");
    }
}

// Gradients of two steps of a channel share a word of delta, in the row of the first: the rows of an operand are steps
// in the order 0, 2, .. 14, 1, 3, .. 15.
class PackedPage {
  public:
    using T = __nv_bfloat16;
    using Low = T;
    static constexpr bool kPacked = true;

    __device__ PackedPage(float* shared, const BackwardShared& layout, int rank, int tile)
        : low(reinterpret_cast<T*>(shared + layout.low)),
          delta(shared + layout.delta),
          stride(delta_stride(tile)),
          high_(reinterpret_cast<T*>(shared + layout.weights)),
          rest_(high_ + tile * packed_stride(rank)),
          rank_(rank),
          tile_(tile),
          row_(packed_stride(rank)),
          lane_(threadIdx.x % 32) {}

    __device__ int low_stride() const { return row_; }

    __device__ void stage_weights(const Scan& s, int direction, int first_channel) const {
        const float* source = s.dt_weight.data + direction * s.dt_weight.direction_stride;
        constexpr int kLanes = 16, kBatch = 8;  // threads along a channel's weights; loads in flight together
        const int columns = packed_columns(rank_), channels = blockDim.x / kLanes;
        for (int r = threadIdx.x % kLanes; r < columns; r += kLanes) {
            for (int first = threadIdx.x / kLanes; first < tile_; first += channels * kBatch) {
                float weight[kBatch];
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    const int c = first + i * channels;
                    const bool there = r < rank_ && c < tile_ && first_channel + c < s.channels;
                    weight[i] = there ? __ldg(source + static_cast<int64_t>(first_channel + c) * rank_ + r) : 0.f;
                }
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    const int c = first + i * channels;
                    if (c >= tile_) continue;
                    const T high = from_float<T>(weight[i]);
                    high_[c * row_ + r] = high;
                    rest_[c * row_ + r] = from_float<T>(weight[i] - to_float(high));
                }
            }
        }
    }

    // in_pairs: rows_in_pairs(s).
    __device__ void stage_rows(const PageStore<Low>& page, const Scan& s, int64_t image, int direction,
                               bool in_pairs) const {
        if (!in_pairs) return cuda::stage_rows<T, 1>(page, row_, s, image, direction, 0, kLn2);
        constexpr int kBatch = 4;  // loads in flight together
        const int words = rank_ / 2 + 1;
        const int bits = words <= 4 ? 2 : words <= 8 ? 3 : words <= 16 ? 4 : 5, all = kPageSteps << bits;
        const Column<T> rows(s.dt, image, direction, 0);
        for (int first = threadIdx.x; first < all; first += blockDim.x * kBatch) {
            uint32_t value[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int at = first + i * blockDim.x, word = at & ((1 << bits) - 1);
                const int place = at < all && word < words ? page.row_at[at >> bits] : -1;
                value[i] = 0;
                if (place >= 0)
                    value[i] =
                        __ldg(reinterpret_cast<const uint32_t*>(offset_by(rows.data, place, rows.stride)) + word);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int at = first + i * blockDim.x, word = at & ((1 << bits) - 1), t = at >> bits;
                if (at >= all || word >= words) continue;
                if (word + 1 < words) {
                    reinterpret_cast<uint32_t*>(low + t * row_)[word] = value[i];
                } else {
                    const float2 gains = unpack<T>(value[i]);
                    reinterpret_cast<float2*>(page.gains)[t] =
                        make_float2(gains.x * kLn2, page.at[t] < 0 ? 0.f : gains.y);
                }
            }
        }
    }

    __device__ void expand(const PageStore<Low>& page, const Scan& s, int64_t image, int direction, int first_channel,
                           int count) const {
        const int warp_channel = threadIdx.x / 32 * 32, g = lane_ / 4, q = lane_ % 4;
        if (rank_ == 0)
            return read_full_steps<T, 32>(delta, stride, page.row_at, s, image, direction, first_channel, warp_channel,
                                          count);
        // Steps are the rows of a, channels the columns of b.
        const T* a_row = low + lane_ % 16 * row_ + lane_ / 16 * 8;
        const int b_row = (warp_channel + lane_ % 8 + lane_ / 16 * 8) * row_ + lane_ / 8 % 2 * 8;
        for (int t = 0; t < count; t += 16) {
            float acc[4][4] = {};
            for (int r = 0; r < rank_; r += 16) {
                uint32_t a[4];
                load_matrices<false>(a, a_row + t * row_ + r);
#pragma unroll
                for (int n = 0; n < 4; n += 2) {
                    uint32_t high[4], rest[4];
                    load_matrices<false>(high, high_ + b_row + n * 8 * row_ + r);
                    load_matrices<false>(rest, rest_ + b_row + n * 8 * row_ + r);
                    mma_bf16(acc[n], a[0], a[1], a[2], a[3], rest[0], rest[1]);
                    mma_bf16(acc[n + 1], a[0], a[1], a[2], a[3], rest[2], rest[3]);
                    mma_bf16(acc[n], a[0], a[1], a[2], a[3], high[0], high[1]);
                    mma_bf16(acc[n + 1], a[0], a[1], a[2], a[3], high[2], high[3]);
                }
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float* out = delta + (t + g) * stride + warp_channel + n * 8 + 2 * q;
                *reinterpret_cast<float2*>(out) = make_float2(acc[n][0], acc[n][1]);
                *reinterpret_cast<float2*>(out + 8 * stride) = make_float2(acc[n][2], acc[n][3]);
            }
        }
    }

    __device__ __forceinline__ void keep(int t, int column, float first, float second) const {
        reinterpret_cast<uint32_t*>(delta)[t * stride + column] = pack<T>(first, second);
    }
    __device__ T kept(int t, int column) const {
        return reinterpret_cast<const T*>(delta)[((t & ~1) * stride + column) * 2 + t % 2];
    }

    // Step gradients (steps x channels) times weights (channels x rank).
    __device__ void store_row_grads(float* rows, int64_t features, int count) const {
        const int g = lane_ / 4, q = lane_ % 4, pairs = packed_columns(rank_) / 16;
        for (int unit = threadIdx.x / 32; unit < (count + 15) / 16 * pairs; unit += blockDim.x / 32) {
            const int t = unit / pairs * 16, r = unit % pairs * 16;
            const bool both = r + 8 < rank_;
            const uint2* words = reinterpret_cast<const uint2*>(delta + (t + 2 * g) * stride + 2 * q);
            const T* b_row = high_ + lane_ % 16 * row_ + lane_ / 16 * 8 + r;
            float acc[2][4] = {};
            for (int c = 0; c < tile_; c += 16) {
                const uint2 left = words[c / 2], right = words[c / 2 + 4];
                const uint32_t a[4] = {__byte_perm(left.x, left.y, 0x5410), __byte_perm(left.x, left.y, 0x7632),
                                       __byte_perm(right.x, right.y, 0x5410), __byte_perm(right.x, right.y, 0x7632)};
                uint32_t b[4];
                load_matrices<true>(b, b_row + c * row_);
                mma_bf16(acc[0], a[0], a[1], a[2], a[3], b[0], b[1]);
                if (both) mma_bf16(acc[1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int step = t + 2 * g + i / 2 % 2, column = r + i / 4 * 8 + 2 * q + i % 2;
                if (step < count && column < rank_) rows[step * features + column] = acc[i / 4][i % 4];
            }
        }
    }

    // Step gradients, transposed, times rows (steps x rank): they add up over pages, always by the same thread.
    __device__ void add_weight_grads(float* weight_grads, int64_t channels_left, int64_t channels, bool first_page,
                                     int count) const {
        const int g = lane_ / 4, q = lane_ % 4, pairs = packed_columns(rank_) / 16;
        for (int unit = threadIdx.x / 32; unit < tile_ / 16 * pairs; unit += blockDim.x / 32) {
            const int c = unit / pairs * 16, r = unit % pairs * 16;
            const bool both = r + 8 < rank_;
            float acc[8] = {}, before[8] = {};
            float* to = weight_grads + (r + 2 * q) * channels + c + g;
            const auto counts = [&](int i) {  // channel c + g or eight behind, column 2 q or its neighbour, of both
                return c + g + i / 2 % 2 * 8 < channels_left && r + i / 4 * 8 + 2 * q + i % 2 < rank_;
            };
            const auto offset = [&](int i) { return (i / 4 * 8 + i % 2) * channels + i / 2 % 2 * 8; };
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (!first_page && counts(i)) before[i] = to[offset(i)];
            const uint32_t* words = reinterpret_cast<const uint32_t*>(delta) + 2 * q * stride + c + g;
            const T* b_row = low + lane_ % 16 * row_ + lane_ / 16 * 8 + r;
            for (int t = 0; t < count; t += 16) {
                const uint32_t *near = words + t * stride, *far = near + 8 * stride;
                uint32_t b[4];
                load_matrices<true>(b, b_row + t * row_);
                const uint32_t a[4] = {near[0], near[8], far[0], far[8]};
                mma_bf16(reinterpret_cast<float (&)[4]>(acc[0]), a[0], a[1], a[2], a[3], b[0], b[1]);
                if (both) mma_bf16(reinterpret_cast<float (&)[4]>(acc[4]), a[0], a[1], a[2], a[3], b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (counts(i)) to[offset(i)] = before[i] + acc[i];
        }
    }

    T* low;
    float* delta;
    int stride;  // of delta

  private:
    T *high_, *rest_;  // weights: (tile, row_), rounded, and what rounding left
    int rank_, tile_, row_, lane_;
};

template <typename T>
using BackwardPage = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, PackedPage, FloatPage<T>>;

}  // namespace vmamba::cuda

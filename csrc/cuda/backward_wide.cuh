// The backward scan for more than one state. The recurrence is that of backward.cuh; what differs is how the work is
// laid out.
//
// A warp has 8 channels and a group of 16 states: lane 4 * i + part holds the states from 4 * part on of channel i. A
// page is walked three times: forwards from its checkpoint, keeping the states before every span of eight steps in
// shared memory; then, span by span from the last to the first, forwards again with all states and decays of the span
// in registers, and backwards. Sums over states (du, ddt) go over the four lanes of a channel, after which each lane
// finishes one step of four; sums over channels (dB, dC) go over the warp, then in a fixed order over warps, then over
// tiles (gather.cu).
#pragma once

#include "backward_sums.cuh"
#include "backward_wide_layout.cuh"

namespace vmamba::cuda {

// Where a step keeps a warp's sum: columns exchange places, so that the four steps that a warp stores together touch
// different banks.
__device__ __forceinline__ int spread(int step, int column) { return column ^ (step % 2 * 2 | step / 2 % 2 * 16); }

// What a span adds up, step by step from its last to its first: over the warp's channels, dB = g * gain and dC = h *
// dy, to a row of B then C for each step; over a channel's states, g * B, of which a lane gets step 4 * half + part.
template <bool Tensor, int Tile>
class SpanSums;

// In float32: butterflies.
template <int Tile>
class SpanSums<false, Tile> {
  public:
    __device__ SpanSums(float* sums, const float*, const float*, const float*, const float*) : sums_(sums) {}

    __device__ __forceinline__ void add(int j, const float (&g)[kPartStates], const float (&h)[kPartStates], float gain,
                                        float dy, const float (&B)[kPartStates]) {
        float over_channels[2 * kPartStates];
        float& over_states = over_states_[j % kParts];
        over_states = 0.f;
#pragma unroll
        for (int n = 0; n < kPartStates; ++n) {
            over_channels[n] = g[n] * gain;
            over_channels[kPartStates + n] = h[n] * dy;
            over_states = fmaf(g[n], B[n], over_states);
        }
        // Lane bits from 16 down to 4 spell the value: dB or dC, then the state within the lane's four.
        const int lane = threadIdx.x % 32, kind = lane / 16, n = lane / kParts % kPartStates;
        sums_[j * kStepSums<Tile> + spread(j, kind * kWideGroup + lane % kParts * kPartStates + n)] =
            scatter_sum<2 * kPartStates, 16>(over_channels);
    }
    __device__ __forceinline__ float over_states(int) { return scatter_sum<kParts, kParts / 2>(over_states_); }
    __device__ __forceinline__ void store() {}

  private:
    float* sums_;
    float over_states_[kParts];
};

// For bfloat16 inputs: three tensor-core products a step, of g and h rounded to bfloat16. Each has a column for each
// step of the span, so that the span's sums end in ten registers: an operand is zero but for the column of the step at
// hand. Lane 4 * i + q holds the columns of steps q and q + 4 of the products, and the operands of step
// i % 2 * 4 + i / 2.
template <int Tile>
class SpanSums<true, Tile> {
  public:
    // grads: null where there is no gradient of y, only of the states.
    __device__ SpanSums(float* sums, const float* steps, const float* inputs, const float* grads, const float* B)
        : sums_(sums) {
        const int q = threadIdx.x % 4, t = own_step();
        const float2 step = *reinterpret_cast<const float2*>(steps + t * kWideStride<Tile> + q * 2);
        const float2 u = *reinterpret_cast<const float2*>(inputs + t * kWideStride<Tile> + q * 2);
        const float2 dy = grads ? *reinterpret_cast<const float2*>(grads + t * kWideStride<Tile> + q * 2) : float2{};
        const float4 b = *reinterpret_cast<const float4*>(B + t * kWideGains + q * kPartStates);
        gain_ = pack(step.x * u.x, step.y * u.y);
        dy_ = pack(dy.x, dy.y);
        B_[0] = pack(b.x, b.y), B_[1] = pack(b.z, b.w);
    }

    __device__ __forceinline__ void add(int j, const float (&g)[kPartStates], const float (&h)[kPartStates], float,
                                        float, const float (&)[kPartStates]) {
        const uint32_t of_g[2] = {pack(g[0], g[1]), pack(g[2], g[3])};
        const uint32_t of_h[2] = {pack(h[0], h[1]), pack(h[2], h[3])};
        const bool own = own_step() == j;
        mma_bf16(over_states_, of_g[0], 0u, of_g[1], 0u, own ? B_[0] : 0u, own ? B_[1] : 0u);
        mma_bf16(dB_, transpose(of_g[0]), transpose(of_g[1]), own ? gain_ : 0u);
        mma_bf16(dC_, transpose(of_h[0]), transpose(of_h[1]), own ? dy_ : 0u);
    }
    __device__ __forceinline__ float over_states(int half) { return over_states_[half]; }
    __device__ __forceinline__ void store() {
        const int lane = threadIdx.x % 32, i = lane / 4, state = i / 2 * kPartStates + i % 2;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int step = lane % 4 + k % 2 * 4;
            float* to = sums_ + step * kStepSums<Tile>;
            to[spread(step, state + k / 2 * 2)] = dB_[k];
            to[spread(step, kWideGroup + state + k / 2 * 2)] = dC_[k];
        }
    }

  private:
    static __device__ __forceinline__ int own_step() {
        const int i = threadIdx.x % 32 / 4;
        return i % 2 * 4 + i / 2;
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        uint32_t x;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
        return x;
    }

    float* sums_;
    uint32_t gain_, dy_, B_[2];
    float over_states_[4] = {}, dB_[4] = {}, dC_[4] = {};
};

// A warp's channels at every position of an (image, direction), where a page is read from or written to global memory:
// lane 4 * row + pair has two neighbouring channels of every eighth step.
struct PairView {
    static constexpr int kPairs = kWarpChannels / 2, kRows = 32 / kPairs;
    int column;          // of the first channel, within the tile
    int row;             // the first step
    bool first, second;  // whether there are such channels
    __device__ explicit PairView(int channels_left)
        : column(threadIdx.x / 32 * kWarpChannels + threadIdx.x % kPairs * 2),
          row(threadIdx.x % 32 / kPairs),
          first(column < channels_left),
          second(column + 1 < channels_left) {}
};

template <typename V>
struct alignas(2 * sizeof(V)) Two {
    V first, second;
};

template <typename V>
__device__ __forceinline__ Two<V> read_two(const char* from) {
    using Word = std::conditional_t<sizeof(V) == 2, uint32_t, uint2>;
    const Word word = __ldg(reinterpret_cast<const Word*>(from));
    return reinterpret_cast<const Two<V>&>(word);
}

// Whether two channels from an even one on can be read together.
template <typename V>
__device__ __forceinline__ bool in_pairs(const Rows& rows, int64_t channels) {
    return (channels | rows.image_stride | rows.direction_stride | rows.position_stride) % 2 == 0 &&
           reinterpret_cast<uintptr_t>(rows.data) % (2 * sizeof(V)) == 0;
}

// Reads a page of an activation: to[t * kWideStride] = scale * the values in row_of(t), or zero where that is negative.
template <int Tile, bool Together, typename V, typename RowOf>
__device__ __forceinline__ void stage_pairs(float* to, const PairView& view, const Column<V>& column, float scale,
                                            const RowOf& row_of) {
    constexpr int kBatch = 8;  // loads in flight together
    const int without_first = view.first ? 0 : -1, without_second = view.second ? 0 : -1;
    Column<V> second = column;
    second.data += sizeof(V);
    for (int t = view.row; t < kPageSteps; t += PairView::kRows * kBatch) {
        Two<V> value[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int row = row_of(t + i * PairView::kRows);
            if constexpr (Together) {
                value[i] = {from_float<V>(0.f), from_float<V>(0.f)};
                if ((row | without_first) >= 0) value[i] = read_two<V>(offset_by(column.data, row, column.stride));
            } else {
                value[i] = {column.at_or_zero(row | without_first), second.at_or_zero(row | without_second)};
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            *reinterpret_cast<float2*>(to + (t + i * PairView::kRows) * kWideStride<Tile> + view.column) =
                make_float2(to_float(value[i].first) * scale, to_float(value[i].second) * scale);
        }
    }
}

template <int Tile, typename V, typename RowOf>
__device__ __forceinline__ void stage_activation(float* to, const PairView& view, const Rows& rows, int64_t image,
                                                 int direction, const Scan& s, int first_channel, float scale,
                                                 const RowOf& row_of) {
    const Column<V> column(rows, image, direction, first_channel + (view.first ? view.column : 0));
    if (in_pairs<V>(rows, s.channels)) {
        stage_pairs<Tile, true>(to, view, column, scale, row_of);
    } else {
        stage_pairs<Tile, false>(to, view, column, scale, row_of);
    }
}

// Writes the first `count` steps of a page, as rows of D.
template <int Tile, typename V>
__device__ __forceinline__ void write_pairs(V* to, const PairView& view, int64_t channels, const float* from,
                                            int count) {
    const uint32_t stride = static_cast<uint32_t>(channels * sizeof(V));
    char* first = reinterpret_cast<char*>(to + view.column);
    if (channels % 2 == 0) {
        if (!view.first) return;
#pragma unroll 8
        for (int t = view.row; t < count; t += PairView::kRows) {
            const float2 x = *reinterpret_cast<const float2*>(from + t * kWideStride<Tile> + view.column);
            *reinterpret_cast<Two<V>*>(offset_by(first, t, stride)) = {from_float<V>(x.x), from_float<V>(x.y)};
        }
        return;
    }
    for (int t = view.row; t < count; t += PairView::kRows) {
        V* pair = reinterpret_cast<V*>(offset_by(first, t, stride));
        if (view.first) pair[0] = from_float<V>(from[t * kWideStride<Tile> + view.column]);
        if (view.second) pair[1] = from_float<V>(from[t * kWideStride<Tile> + view.column + 1]);
    }
}

// Pass::summary: what a chunk hands to the one before it if nothing arrives from behind, and how much of an arriving
// gradient survives. Pass::output: all gradients.
template <typename T, int Tile, bool OfStates, Pass pass>
__global__ void __launch_bounds__(kWideWarps<Tile> * 32, 2 * kWideTile / Tile)
    backward_wide_kernel(const __grid_constant__ BackwardArgs args) {
    constexpr bool kExact = std::is_same_v<T, float>;
    constexpr bool kTensorSums = std::is_same_v<T, __nv_bfloat16>;
    constexpr int kStates = kPartStates;
    const Scan& s = args.scan;
    const Cut& cut = args.cut;
    const int slices = static_cast<int>(s.directions) * cut.groups;
    const Place place = place_of_block(cut.tiles, cut.chunks, slices);
    const int direction = place.slice / cut.groups, first_state = place.slice % cut.groups * kWideGroup;
    const int first_channel = place.tile * cut.tile, channels_left = static_cast<int>(s.channels) - first_channel;
    const int64_t row = place.image * slices + place.slice;
    const int rank = static_cast<int>(s.rank), features = rank + 2 * kWideGroup;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int part = lane % kParts, column = warp * kWarpChannels + lane / kParts;
    const int lane_state = first_state + part * kStates;
    const bool active = column < channels_left;
    const int64_t channel = first_channel + column;
    const PairView view(channels_left);
    // Where steps pass through softplus, a lane has every fourth step of one channel.
    const int flat_column = warp * kWarpChannels + lane % kWarpChannels, flat_step = lane / kWarpChannels;
    constexpr int kFlatSteps = 32 / kWarpChannels;

    extern __shared__ __align__(16) float shared[];
    using Shared = BackwardWideShared<Tile>;
    const PageStore<> page{reinterpret_cast<int*>(shared), reinterpret_cast<int*>(shared) + kPageSteps,
                           shared + 2 * kPageSteps, shared + Shared::kLow, shared + Shared::kGains};
    float* weights = shared + Shared(rank).weights;
    float* steps = shared + Shared::kSteps;    // later the gradients of raw steps
    float* inputs = shared + Shared::kInputs;  // u times ln 2, later its gradient
    float* grads = shared + Shared::kGrads;    // of the result
    float4* kept_states = reinterpret_cast<float4*>(shared + Shared::kStates) + thread;
    float* sums = shared + Shared::kSums;
    if (rank) {
        stage_weights<kExact>(weights, s, direction, first_channel, cut.tile);
        clear_low(page.low, rank_stride(rank));
    }
    for (int i = thread; i < kWideSpan * kStepSums<Tile>; i += blockDim.x)
        sums[i] = 0.f;  // of warps that are not there

    const Walk walk(s, place.image, direction);
    const Stepper<kExact> stepper(s.dt_bias, direction, first_channel + min(flat_column, channels_left - 1),
                                  s.dt_softplus);
    const bool merged = s.result == Result::merged;
    const int64_t grad_row = merged ? place.image * s.length : (place.image * s.directions + direction) * s.steps;

    const int64_t carry_at = ((row * cut.chunks + place.chunk) * s.channels + channel) * kWideGroup + part * kStates;
    float A[kStates], g[kStates], dA[kStates] = {};
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
        const bool there = active && lane_state + n < s.states;
        A[n] = there ? s.A.data[direction * s.A.direction_stride + channel * s.states + lane_state + n] : 0.f;
        g[n] = pass == Pass::output && args.carry && active ? args.carry[carry_at + n] : 0.f;
    }
    const float skip = s.D.data && active && first_state == 0 && !OfStates
                           ? s.D.data[direction * s.D.direction_stride + channel]
                           : 0.f;
    float d_skip = 0.f, d_bias = 0.f, elapsed = 0.f, dropped = 0.f;

    const int64_t begin = place.chunk * cut.chunk_steps;
    const int64_t end = min(begin + cut.chunk_steps, s.steps);
    const int64_t pages = end > begin ? (end - begin + kPageSteps - 1) / kPageSteps : 0;
    // Parameter gradients of this block's chunk: (group + 2 + R) rows of D, from the tile's first channel.
    float* params = pass == Pass::summary ? nullptr
                                          : args.params +
                                                ((place.image * cut.chunks + place.chunk) * slices + place.slice) *
                                                    (kWideGroup + 2 + rank) * s.channels +
                                                first_channel;
    for (int64_t i = pages - 1; i >= 0; --i) {
        const int64_t at = begin + i * kPageSteps;
        const int count = static_cast<int>(min(static_cast<int64_t>(kPageSteps), end - at));
        const int spans = (count + kWideSpan - 1) / kWideSpan;
        __syncthreads();
        stage_positions(page, walk, at, count);
        __syncthreads();
        stage_rows<T, kWideGroup>(page, rank_stride(rank), s, place.image, direction, first_state);
        stage_activation<Tile, T>(inputs, view, s.u, place.image, direction, s, first_channel, kLn2,
                                  [&](int t) { return page.at[t]; });
        const auto stage_grads = [&](auto zero) {
            using Grad = decltype(zero);
            const Rows rows{static_cast<const Grad*>(args.grad) + grad_row * s.channels, 0, 0, s.channels};
            stage_activation<Tile, Grad>(grads, view, rows, 0, 0, s, first_channel, 1.f, [&](int t) {
                const int p = page.at[t];
                return merged || p < 0 ? p : static_cast<int>(at) + t;
            });
        };
        if constexpr (!OfStates) {
            if (args.grad_dtype == Scalar::f32) {
                stage_grads(float{});
            } else {
                stage_grads(T{});
            }
        }
        __syncthreads();
        expand_steps<T, kWarpChannels>(steps, kWideStride<Tile>, page, weights, s, place.image, direction,
                                       first_channel, warp * kWarpChannels, count);
        __syncwarp();
#pragma unroll 8
        for (int t = flat_step; t < kPageSteps; t += kFlatSteps) {
            float& slot = steps[t * kWideStride<Tile> + flat_column];
            const float step = stepper.step(slot);
            slot = t < count ? step : 0.f;
        }
        __syncwarp();

        float* own_steps = steps + column;
        float* own_inputs = inputs + column;
        const float* own_grads = grads + column;
        const float* own_gains = page.gains + part * kStates;
        const auto grad_at = [&](int t) { return OfStates ? 0.f : own_grads[t * kWideStride<Tile>]; };
        const auto states_grad = [&](int t, int n) {
            if (t >= count || !active || lane_state + n >= s.states) return 0.f;
            return load_as(args.grad, ((grad_row + at + t) * s.channels + channel) * s.states + lane_state + n,
                           args.grad_dtype);
        };

        if constexpr (pass == Pass::summary) {
            for (int span = spans - 1; span >= 0; --span) {
#pragma unroll
                for (int j = kWideSpan - 1; j >= 0; --j) {
                    const int t = span * kWideSpan + j;
                    const float drop = page.drop[t], step = own_steps[t * kWideStride<Tile>], dy = grad_at(t);
                    float C[kStates];
                    load_floats(C, own_gains + t * kWideGains + kWideGroup);
                    elapsed += step;
                    dropped += drop;
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        const float from_result = OfStates ? states_grad(t, n) : C[n] * dy;
                        g[n] = (g[n] + from_result) * exp2_fast(fmaf(step, A[n], drop));
                    }
                }
            }
            continue;
        }

        float h[kStates];
        const auto read_checkpoint = [&] {
            const float* from = args.checkpoints +
                                (((place.image * s.directions + direction) * args.checkpoint_count +
                                  at / checkpoint_interval(kWideGroup)) *
                                     s.channels +
                                 channel) *
                                    s.states +
                                lane_state;
#pragma unroll
            for (int n = 0; n < kStates; ++n) h[n] = active && lane_state + n < s.states ? from[n] : 0.f;
        };
        // A span forwards; hands on each decay.
        const auto advance = [&](int first, const auto& with_decay) {
            float drop[kWideSpan];
            load_floats(drop, page.drop + first);
#pragma unroll
            for (int j = 0; j < kWideSpan; ++j) {
                const int t = first + j;
                const float step = own_steps[t * kWideStride<Tile>], gain = step * own_inputs[t * kWideStride<Tile>];
                float B[kStates];
                load_floats(B, own_gains + t * kWideGains);
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const float decay = exp2_fast(fmaf(step, A[n], drop[j]));
                    with_decay(j, n, decay);
                    h[n] = fmaf(decay, h[n], gain * B[n]);
                }
            }
        };
        read_checkpoint();
        for (int span = 0; span < spans - 1; ++span) {
            advance(span * kWideSpan, [](int, int, float) {});
            kept_states[span * kWideWarps<Tile> * 32] = make_float4(h[0], h[1], h[2], h[3]);
        }

        // What a channel's step comes to, once its states are summed: gradients of u and of the raw step.
        const auto finish = [&](int t, float through_gain, float through_decay) {
            const float step = own_steps[t * kWideStride<Tile>], input = own_inputs[t * kWideStride<Tile>] * kLog2e,
                        dy = grad_at(t);
            const float counts = t < count ? 1.f : 0.f;  // a factor, since a branch would end the overlap of steps
            const float raw_grad = fmaf(through_gain, input, through_decay) * stepper.slope(step) * counts;
            d_skip = fmaf(dy, input, d_skip);
            d_bias += raw_grad;
            own_steps[t * kWideStride<Tile>] = raw_grad;
            own_inputs[t * kWideStride<Tile>] = fmaf(through_gain, step * kLn2, skip * dy);
        };
        for (int span = spans - 1; span >= 0; --span) {
            const int first = span * kWideSpan;
            if (span == 0) {
                if (spans > 1) read_checkpoint();
            } else if (span < spans - 1) {
                const float4 v = kept_states[(span - 1) * kWideWarps<Tile> * 32];
                h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
            }
            float decay[kWideSpan][kStates], before[kWideSpan][kStates];  // and the state before the step
            advance(first, [&](int j, int n, float x) {
                decay[j][n] = x;
                before[j][n] = h[n];
            });
            const int corner = first * kWideStride<Tile> + warp * kWarpChannels;
            SpanSums<kTensorSums, Tile> total(sums + warp * kWideGains, steps + corner, inputs + corner,
                                              OfStates ? nullptr : grads + corner, page.gains + first * kWideGains);
#pragma unroll
            for (int half = kWideSpan / kParts - 1; half >= 0; --half) {
                float through_decay[kParts];
#pragma unroll
                for (int i = kParts - 1; i >= 0; --i) {
                    const int j = half * kParts + i, t = first + j;
                    const float step = own_steps[t * kWideStride<Tile>], dy = grad_at(t);
                    float B[kStates], C[kStates];
                    load_floats(B, own_gains + t * kWideGains);
                    load_floats(C, own_gains + t * kWideGains + kWideGroup);
#pragma unroll
                    for (int n = 0; n < kStates; ++n) g[n] = OfStates ? g[n] + states_grad(t, n) : fmaf(C[n], dy, g[n]);
                    total.add(j, g, h, step * own_inputs[t * kWideStride<Tile>], dy, B);
                    through_decay[i] = 0.f;
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        g[n] *= decay[j][n];
                        h[n] = before[j][n];
                        const float on_exponent = g[n] * h[n];
                        through_decay[i] = fmaf(on_exponent, A[n], through_decay[i]);
                        dA[n] = fmaf(on_exponent, step, dA[n]);
                    }
                }
                const float own_gain = total.over_states(half);
                const float own_decay = scatter_sum<kParts, kParts / 2>(through_decay);
                __syncwarp();
                finish(first + half * kParts + part, own_gain, own_decay);
            }
            total.store();
            __syncthreads();
            float* rows = args.rows + ((row * cut.tiles + place.tile) * s.steps + at + first) * features + rank;
            for (int j = warp; j < min(kWideSpan, count - first); j += blockDim.x / 32) {
                const float* source = sums + j * kStepSums<Tile> + spread(j, lane);
                float over_warps = source[0];
#pragma unroll
                for (int w = 1; w < kWideWarps<Tile>; ++w) over_warps += source[w * kWideGains];
                rows[j * features + lane] = over_warps;
            }
            __syncthreads();
        }

        const int64_t written = (row * s.steps + at) * s.channels + first_channel;
        const auto write = [&](void* to, const float* from) {
            if (cut.groups == 1) {
                write_pairs<Tile>(static_cast<T*>(to) + written, view, s.channels, from, count);
            } else {
                write_pairs<Tile>(static_cast<float*>(to) + written, view, s.channels, from, count);
            }
        };
        write(args.du, inputs);
        if (rank == 0) {
            write(args.ddt, steps);
        } else {
            float* rows = args.rows + ((row * cut.tiles + place.tile) * s.steps + at) * features;
            store_row_grads<kExact>(rows, features, steps, kWideStride<Tile>, weights, rank, cut.tile, count);
            add_weight_grads<kExact>(params + (kWideGroup + 2) * s.channels, channels_left, s.channels, i == pages - 1,
                                     steps, kWideStride<Tile>, page.low, rank, cut.tile, count);
        }
    }

    if constexpr (pass == Pass::summary) {
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            if (!active) continue;
            args.carry_out[carry_at + n] = g[n];
            args.decay[carry_at + n] = exp2_fast(fmaf(elapsed, A[n], dropped));
        }
    } else {
#pragma unroll
        for (int distance = kParts / 2; distance > 0; distance /= 2) {
            d_skip += __shfl_xor_sync(kFullWarp, d_skip, distance);
            d_bias += __shfl_xor_sync(kFullWarp, d_bias, distance);
        }
        if (!active) return;
#pragma unroll
        for (int n = 0; n < kStates; ++n) params[(part * kStates + n) * s.channels + column] = dA[n] * kLn2;
        if (part == 0) {
            params[kWideGroup * s.channels + column] = d_skip;
            params[(kWideGroup + 1) * s.channels + column] = d_bias;
        }
        if (pages == 0)
            for (int r = part; r < rank; r += kParts) params[(kWideGroup + 2 + r) * s.channels + column] = 0.f;
    }
}

template <typename T, int Tile, bool OfStates, Pass pass>
void launch_backward_wide_kernel(const BackwardArgs& args, cudaStream_t stream) {
    const Cut& cut = args.cut;
    const int64_t blocks = args.scan.batch * args.scan.directions * cut.groups * cut.tiles * cut.chunks;
    const int64_t bytes = BackwardWideShared<Tile>(static_cast<int>(args.scan.rank)).bytes;
    launch(backward_wide_kernel<T, Tile, OfStates, pass>, blocks, cut.tile / kWarpChannels * 32, bytes, stream, args);
}

// One compilation unit per input dtype instantiates this.
template <typename T>
void backward_wide_pass(const BackwardArgs& args, Pass pass, cudaStream_t stream) {
    const auto run = [&](auto tile, auto of_states) {
        constexpr int kTile = decltype(tile)::value;
        constexpr bool kOfStates = decltype(of_states)::value;
        if (pass == Pass::summary) return launch_backward_wide_kernel<T, kTile, kOfStates, Pass::summary>(args, stream);
        launch_backward_wide_kernel<T, kTile, kOfStates, Pass::output>(args, stream);
    };
    const auto run_tile = [&](auto tile) {
        if (args.scan.result == Result::states) return run(tile, std::true_type{});
        run(tile, std::false_type{});
    };
    if (args.cut.tile <= kSmallWideTile) return run_tile(std::integral_constant<int, kSmallWideTile>{});
    run_tile(std::integral_constant<int, kWideTile>{});
}

}  // namespace vmamba::cuda

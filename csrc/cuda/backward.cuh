// The backward scan: a block walks its chunk from the last page to the first. Per page it recomputes the states from
// the page's checkpoint, then runs the recurrence of the state's gradient backwards:
//
//     g_t = C_t dy_t + a_{t+1} g_{t+1}          a_t = exp(dt_t A)
//     dC_t = sum over channels of dy_t h_t       dB_t = sum over channels of g_t dt_t u_t
//     du_t = dt_t (g_t . B_t) + D dy_t           ddt_t = u_t (g_t . B_t) + sum over n of A a_t h_{t-1} g_t
//
// Work is laid out so that everything lives in registers for eight steps: one lane holds one channel's single state, or
// four lanes hold four states each of a group of 16 (they also split the per-channel work of those eight steps).
// Sums over channels are butterflies within a warp, then a fixed order over warps, then over tiles (gather.cu). The
// low-rank factor's gradients are two tensor-core products with the page's tile of step gradients.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {

// How a group of states is spread over lanes.
template <int Group>
struct Lanes {
    static constexpr int kLanes = Group == 1 ? 1 : 4;  // lanes of one channel
    static constexpr int kStates = Group / kLanes;     // states in a lane
    static constexpr int kSpan = Group == 1 ? 16 : 8;  // steps held in registers
    static constexpr int kOwn = kSpan / kLanes;        // steps of a span whose per-channel work a lane does
    static constexpr int kWidth = 32 / kLanes;         // channels in a warp
};

struct BackwardShared {
    int64_t low, gains, weights, delta, states, sums, bytes;
    __host__ __device__ BackwardShared(int rank, int group, int tile) {
        const int lanes = group == 1 ? 1 : 4, threads = tile * lanes;
        low = 3 * kPageSteps;
        gains = low + (rank ? kPageSteps * rank_stride(rank) : 0);
        weights = gains + kPageSteps * 2 * group;
        delta = weights + (rank ? tile * rank_stride(rank) : 0);
        states = delta + kPageSteps * delta_stride(tile);
        sums = states + (group == 1 ? 0 : kPageSteps / Lanes<kWideGroup>::kSpan * threads * (group / lanes));
        bytes = (sums + (threads / 32) * (group == 1 ? kPageSteps : 2 * Lanes<kWideGroup>::kSpan) * 2 * group) * 4;
    }
};

// The value of step j, which one of the lanes of a channel owns.
template <int Group>
__device__ __forceinline__ float of_step(const float (&own)[Lanes<Group>::kOwn], int j) {
    using L = Lanes<Group>;
    if constexpr (L::kLanes == 1) {
        return own[j];
    } else {
        return __shfl_sync(kFullWarp, own[j % L::kOwn], j / L::kOwn, L::kLanes);
    }
}

// From four lanes' shares of eight values to the totals of the two that each lane owns.
__device__ __forceinline__ void sum_over_lanes(const float (&share)[8], float (&own)[2]) {
    const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    float half[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float mine = upper ? share[4 + j] : share[j], other = upper ? share[j] : share[4 + j];
        half[j] = mine + __shfl_xor_sync(kFullWarp, other, 2);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float mine = odd ? half[2 + j] : half[j], other = odd ? half[j] : half[2 + j];
        own[j] = mine + __shfl_xor_sync(kFullWarp, other, 1);
    }
}

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

// Pass::summary: what a chunk hands to the one before it if nothing arrives from behind, and how much of an arriving
// gradient survives. Pass::output: all gradients.
template <typename T, typename Grad, int Group, bool OfStates, Pass pass>
__global__ void __launch_bounds__(Group == 1 ? 192 : 256, 2)
    backward_kernel(const __grid_constant__ BackwardArgs args) {
    using L = Lanes<Group>;
    constexpr bool kExact = std::is_same_v<T, float>;
    constexpr int64_t kInterval = checkpoint_interval(Group);  // between checkpoints
    constexpr int kStates = L::kStates, kOwn = L::kOwn, kSpan = L::kSpan;
    const Scan& s = args.scan;
    const Cut& cut = args.cut;
    const int slices = static_cast<int>(s.directions) * cut.groups;
    const Place place = place_of_block(cut.tiles, cut.chunks, slices);
    const int direction = place.slice / cut.groups, first_state = place.slice % cut.groups * Group;
    const int first_channel = place.tile * cut.tile;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32;
    const int part = lane % L::kLanes;                       // which lane of the channel this is
    const int column = warp * L::kWidth + lane / L::kLanes;  // channel within the tile
    const int64_t channel = first_channel + column;
    const bool active = channel < s.channels;
    const int64_t safe_channel = active ? channel : s.channels - 1;
    const int64_t row = place.image * slices + place.slice;
    const int rank = static_cast<int>(s.rank), features = rank + 2 * Group;

    extern __shared__ __align__(16) float shared[];
    const BackwardShared layout(rank, Group, cut.tile);
    const PageStore page{reinterpret_cast<int*>(shared), reinterpret_cast<int*>(shared) + kPageSteps,
                         shared + 2 * kPageSteps, shared + layout.low, shared + layout.gains};
    float* weights = shared + layout.weights;
    float* delta = shared + layout.delta;
    float* kept_states = shared + layout.states;
    float* sums = shared + layout.sums;
    const int stride = delta_stride(cut.tile);
    if (rank) {
        stage_weights<kExact>(weights, s, direction, first_channel, cut.tile);
        clear_low(page.low, rank);
    }

    const Walk walk(s, place.image, direction);
    const Column<T> u_column(s.u, place.image, direction, safe_channel);
    // The gradient of the result: per position (merged) or per step; for states, per step, channel and state.
    const bool merged = s.result == Result::merged;
    const int64_t grad_base = merged ? place.image * s.length * s.channels + channel
                                     : (place.image * s.directions + direction) * s.steps * s.channels + channel;
    const Rows grad_rows{static_cast<const Grad*>(args.grad) + grad_base - channel, 0, 0, s.channels};
    const Column<Grad> grad_column(grad_rows, 0, 0, safe_channel);

    const int lane_state = first_state + part * kStates;  // the first state of this lane
    const int64_t carry_at = ((row * cut.chunks + place.chunk) * s.channels + channel) * Group + part * kStates;
    float A[kStates], g[kStates], dA[kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
        const bool there = active && lane_state + n < s.states;
        A[n] = there ? s.A.data[direction * s.A.direction_stride + channel * s.states + lane_state + n] : 0.f;
        g[n] = pass == Pass::output && args.carry && active ? args.carry[carry_at + n] : 0.f;
        dA[n] = 0.f;
    }
    const Stepper<kExact> stepper(s.dt_bias, direction, safe_channel, s.dt_softplus);
    const float skip = s.D.data && active && first_state == 0 && !OfStates
                           ? s.D.data[direction * s.D.direction_stride + channel]
                           : 0.f;
    const int du_size = Group == 1 || cut.groups == 1 ? sizeof(T) : sizeof(float);
    const uint32_t du_stride = static_cast<uint32_t>(s.channels * du_size);
    float d_skip = 0.f, d_bias = 0.f, elapsed = 0.f, dropped = 0.f;

    const int64_t begin = place.chunk * cut.chunk_steps;
    const int64_t end = min(begin + cut.chunk_steps, s.steps);
    const int64_t pages = end > begin ? (end - begin + kPageSteps - 1) / kPageSteps : 0;
    // Parameter gradients of this block's chunk: (group + 2 + R) rows of D, from the tile's first channel.
    float* params = pass == Pass::summary ? nullptr
                                          : args.params +
                                                ((place.image * cut.chunks + place.chunk) * slices + place.slice) *
                                                    (Group + 2 + rank) * s.channels +
                                                first_channel;
    for (int64_t i = pages - 1; i >= 0; --i) {
        const int64_t at = begin + i * kPageSteps;
        const int count = static_cast<int>(min(static_cast<int64_t>(kPageSteps), end - at));
        const int spans = (count + kSpan - 1) / kSpan;
        __syncthreads();
        stage_positions(page, walk, at, count);
        __syncthreads();
        stage_rows<T, Group>(page, s, place.image, direction, first_state);
        __syncthreads();
        expand_steps<T, L::kWidth>(delta, stride, page, weights, s, place.image, direction, first_channel,
                                   warp * L::kWidth, count);
        __syncwarp();
#pragma unroll 8
        for (int t = part; t < kPageSteps; t += L::kLanes) {
            const float step = stepper.step(delta[t * stride + column]);
            delta[t * stride + column] = t < count ? step : 0.f;
        }
        __syncwarp();

        const int silent = active ? 0 : -1;  // makes every position of a channel behind the last one negative
        const auto read_u = [&](T(&u)[kOwn], int t) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) u[j] = u_column.at_or_zero(page.at[t + part * kOwn + j] | silent);
        };
        const auto read_grad = [&](Grad(&dy)[kOwn], int t) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) {
                const int step = t + part * kOwn + j, p = page.at[step] | silent;
                const int grad_row = merged ? p : static_cast<int>(at) + step;
                dy[j] = from_float<Grad>(0.f);
                if (p >= 0 && !OfStates) dy[j] = grad_column.at(grad_row);
            }
        };
        const auto as_floats = [](auto& to, const auto& from) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) to[j] = to_float(from[j]);
        };
        const auto states_grad = [&](int t, int n) {
            if (t >= count || !active || lane_state + n >= s.states) return 0.f;
            return load_as(args.grad, (grad_base + (at + t) * s.channels) * s.states + lane_state + n, args.grad_dtype);
        };

        if constexpr (pass == Pass::summary) {
            for (int span = spans - 1; span >= 0; --span) {
                const int t = span * kSpan;
                Grad raw_dy[kOwn];
                float dy[kOwn];
                read_grad(raw_dy, t);
                as_floats(dy, raw_dy);
#pragma unroll
                for (int j = kSpan - 1; j >= 0; --j) {
                    const float step = delta[(t + j) * stride + column], grad = of_step<Group>(dy, j);
                    const float drop = walk.reset ? page.drop[t + j] : 0.f;
                    float C[kStates];
                    load_floats(C, page.gains + (t + j) * 2 * Group + Group + part * kStates);
                    elapsed += step;
                    dropped += drop;
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        const float from_result = OfStates ? states_grad(t + j, n) : C[n] * grad;
                        g[n] = (g[n] + from_result) * exp2_fast(fmaf(step, A[n], drop));
                    }
                }
            }
            continue;
        }

        const auto checkpoint = [&](int t) {
            return args.checkpoints +
                   (((place.image * s.directions + direction) * args.checkpoint_count + (at + t) / kInterval) *
                        s.channels +
                    channel) *
                       s.states +
                   lane_state;
        };
        float h[kStates];
        T raw_u[kOwn];  // as read; the next span's are on their way while one is worked on
        Grad raw_dy[kOwn];
        read_u(raw_u, (spans - 1) * kSpan);
        read_grad(raw_dy, (spans - 1) * kSpan);
        if constexpr (Group != 1) {
            // Forwards from the page's checkpoint: the state before each span.
#pragma unroll
            for (int n = 0; n < kStates; ++n) h[n] = active && lane_state + n < s.states ? checkpoint(0)[n] : 0.f;
            T ahead_u[kOwn];
            read_u(ahead_u, 0);
            for (int span = 0; span < spans; ++span) {
                const int t = span * kSpan;
#pragma unroll
                for (int n = 0; n < kStates; ++n) kept_states[(span * kStates + n) * blockDim.x + thread] = h[n];
                if (span == spans - 1) break;
                float span_u[kOwn];
                as_floats(span_u, ahead_u);
                read_u(ahead_u, t + kSpan);
#pragma unroll
                for (int j = 0; j < kSpan; ++j) {
                    const float step = delta[(t + j) * stride + column];
                    const float gain = step * kLn2 * of_step<Group>(span_u, j);
                    const float drop = walk.reset ? page.drop[t + j] : 0.f;
                    float B[kStates];
                    load_floats(B, page.gains + (t + j) * 2 * Group + part * kStates);
#pragma unroll
                    for (int n = 0; n < kStates; ++n) h[n] = fmaf(exp2_fast(fmaf(step, A[n], drop)), h[n], gain * B[n]);
                }
            }
        } else {
            h[0] = active ? checkpoint((spans - 1) * kSpan)[0] : 0.f;
        }

        // Backwards, a span at a time.
        for (int span = spans - 1; span >= 0; --span) {
            const int t = span * kSpan;
            float u[kOwn], dy[kOwn], next_h = 0.f;
            as_floats(u, raw_u);
            as_floats(dy, raw_dy);
            if (span > 0) {
                read_u(raw_u, t - kSpan);
                read_grad(raw_dy, t - kSpan);
                if constexpr (Group == 1) next_h = active ? checkpoint(t - kSpan)[0] : 0.f;
            }
            float decay[kSpan][kStates], before[kSpan][kStates];  // and the state before each step
            if constexpr (Group != 1) {
#pragma unroll
                for (int n = 0; n < kStates; ++n) h[n] = kept_states[(span * kStates + n) * blockDim.x + thread];
            }
#pragma unroll
            for (int j = 0; j < kSpan; ++j) {
                const float step = delta[(t + j) * stride + column];
                const float gain = step * kLn2 * of_step<Group>(u, j);
                const float drop = walk.reset ? page.drop[t + j] : 0.f;
                float B[kStates];
                load_floats(B, page.gains + (t + j) * 2 * Group + part * kStates);
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    before[j][n] = h[n];
                    decay[j][n] = exp2_fast(fmaf(step, A[n], drop));
                    h[n] = fmaf(decay[j][n], h[n], gain * B[n]);
                }
            }
            // What a channel's step comes to, once its states are summed: gradients of u and of the raw step.
            char* du = static_cast<char*>(args.du) + ((row * s.steps + at + t) * s.channels + channel) * du_size;
            const auto finish = [&](int j, float input, float grad, float through_gain, float through_decay) {
                float& slot = delta[(t + j) * stride + column];
                const float step = slot, dt_grad = fmaf(through_gain, input, through_decay);
                const float counts =
                    t + j < count ? 1.f : 0.f;  // a factor, since a branch would end the overlap of steps
                const float raw_grad = dt_grad * stepper.slope(step) * counts;
                const float u_grad = fmaf(through_gain, step * kLn2, skip * grad);
                d_skip = fmaf(grad, input, d_skip);
                d_bias += raw_grad;
                slot = raw_grad;
                const bool write = active && t + j < count;
                char* to = offset_by(du, j, du_stride);
                if (Group == 1 || cut.groups == 1) {
                    if (write) *reinterpret_cast<T*>(to) = from_float<T>(u_grad);
                } else {
                    if (write) *reinterpret_cast<float*>(to) = u_grad;
                }
            };
#pragma unroll
            for (int half = kSpan / 8 - 1; half >= 0; --half) {
                float through_gain[8], through_decay[8];
                float narrow_sums[16];  // with one state: eight dB, then eight dC
#pragma unroll
                for (int i = 7; i >= 0; --i) {
                    const int j = half * 8 + i;
                    const float step = delta[(t + j) * stride + column];
                    const float grad = of_step<Group>(dy, j), input = of_step<Group>(u, j);
                    const float gain = step * kLn2 * input;
                    float B[kStates], C[kStates];
                    load_floats(B, page.gains + (t + j) * 2 * Group + part * kStates);
                    load_floats(C, page.gains + (t + j) * 2 * Group + Group + part * kStates);
                    float channel_sums[2 * kStates];
                    through_gain[i] = through_decay[i] = 0.f;
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        g[n] = OfStates ? g[n] + states_grad(t + j, n) : fmaf(C[n], grad, g[n]);
                        channel_sums[n] = g[n] * gain;
                        channel_sums[kStates + n] = grad * h[n];
                        through_gain[i] = fmaf(g[n], B[n], through_gain[i]);
                        g[n] *= decay[j][n];
                        h[n] = before[j][n];
                        const float on_exponent = g[n] * h[n];
                        through_decay[i] = fmaf(on_exponent, A[n], through_decay[i]);
                        dA[n] = fmaf(on_exponent, step, dA[n]);
                    }
                    if constexpr (Group == 1) {
                        narrow_sums[i] = channel_sums[0];
                        narrow_sums[8 + i] = channel_sums[1];
                        finish(j, input, grad, through_gain[i], through_decay[i]);
                    } else {
                        // Lane bits from 16 down spell the value: dB or dC, then the state within the lane's four.
                        const float total = scatter_sum<2 * kStates, 16>(channel_sums);
                        const int value = lane / 4, kind = value / 4, state = part * kStates + value % 4;
                        sums[((span & 1) * kSpan + j) * warps * 2 * Group + warp * 2 * Group + kind * Group + state] =
                            total;
                    }
                }
                if constexpr (Group == 1) {
                    // Lane bits from 16 down to 2 spell dB or dC, then the step.
                    float total = scatter_sum<16, 16>(narrow_sums);
                    total += __shfl_xor_sync(kFullWarp, total, 1);
                    const int step = t + half * 8 + lane / 2 % 8;
                    if (lane % 2 == 0) sums[(step * warps + warp) * 2 + lane / 16] = total;
                } else {
                    float own_gain[kOwn], own_decay[kOwn];
                    sum_over_lanes(through_gain, own_gain);
                    sum_over_lanes(through_decay, own_decay);
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < kOwn; ++j) finish(part * kOwn + j, u[j], dy[j], own_gain[j], own_decay[j]);
                    // Two buffers: the next span fills the other one while this one is added up.
                    __syncthreads();
                    float* rows = args.rows + ((row * cut.tiles + place.tile) * s.steps + at + t) * features + rank;
                    for (int v = thread; v < kSpan * 2 * Group; v += blockDim.x) {
                        const int j = v / (2 * Group), f = v % (2 * Group);
                        const float* source = sums + ((span & 1) * kSpan + j) * warps * 2 * Group + f;
                        float total = 0.f;
                        for (int w = 0; w < warps; ++w) total += source[w * 2 * Group];
                        if (t + j < count) rows[j * features + f] = total;
                    }
                }
            }
            if constexpr (Group == 1) h[0] = next_h;
        }

        __syncthreads();
        float* rows = args.rows + ((row * cut.tiles + place.tile) * s.steps + at) * features;
        if constexpr (Group == 1) {
            for (int v = thread; v < count * 2; v += blockDim.x) {
                float total = 0.f;
                for (int w = 0; w < warps; ++w) total += sums[(v / 2 * warps + w) * 2 + v % 2];
                rows[v / 2 * features + rank + v % 2] = total;
            }
        }
        if (rank == 0) {
            const Scalar type = cut.groups == 1 ? s.dtype : Scalar::f32;
            for (int t = part; t < count && active; t += L::kLanes)
                store_as(args.ddt, (row * s.steps + at + t) * s.channels + channel, delta[t * stride + column], type);
        } else {
            store_row_grads<kExact>(rows, features, delta, stride, weights, rank, cut.tile, count);
            add_weight_grads<kExact>(params + (Group + 2) * s.channels, s.channels - first_channel, s.channels,
                                     i == pages - 1, delta, stride, page.low, rank, cut.tile, count);
        }
    }

    if constexpr (pass == Pass::summary) {
        if (!active) return;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            args.carry_out[carry_at + n] = g[n];
            args.decay[carry_at + n] = exp2_fast(fmaf(elapsed, A[n], dropped));
        }
        return;
    }

#pragma unroll
    for (int distance = L::kLanes / 2; distance > 0; distance /= 2) {
        d_skip += __shfl_xor_sync(kFullWarp, d_skip, distance);
        d_bias += __shfl_xor_sync(kFullWarp, d_bias, distance);
    }
    __syncthreads();
    if (!active) return;
#pragma unroll
    for (int n = 0; n < kStates; ++n) params[(part * kStates + n) * s.channels + column] = dA[n] * kLn2;
    if (part == 0) {
        params[Group * s.channels + column] = d_skip;
        params[(Group + 1) * s.channels + column] = d_bias;
    }
    if (pages == 0)
        for (int r = part; r < rank; r += L::kLanes) params[(Group + 2 + r) * s.channels + column] = 0.f;
}

template <typename T, typename Grad, int Group, bool OfStates, Pass pass>
void launch_backward_kernel(const BackwardArgs& args, cudaStream_t stream) {
    const Cut& cut = args.cut;
    const int64_t blocks = args.scan.batch * args.scan.directions * cut.groups * cut.tiles * cut.chunks;
    const int64_t bytes = BackwardShared(static_cast<int>(args.scan.rank), Group, cut.tile).bytes;
    launch(backward_kernel<T, Grad, Group, OfStates, pass>, blocks, cut.tile * Lanes<Group>::kLanes, bytes, stream,
           args);
}

// One compilation unit per input dtype instantiates this.
template <typename T>
void backward_pass(const BackwardArgs& args, Pass pass, cudaStream_t stream) {
    const bool narrow = args.cut.group == 1, states = args.scan.result == Result::states;
    const auto run = [&](auto group, auto of_states) {
        constexpr int kGroup = decltype(group)::value;
        constexpr bool kOfStates = decltype(of_states)::value;
        // Gradients of states are read as they come, of channels as float or T.
        using Narrow = std::conditional_t<kOfStates, float, T>;
        const bool as_float = kOfStates || args.grad_dtype == Scalar::f32;
        if (pass == Pass::summary) {
            if (as_float) return launch_backward_kernel<T, float, kGroup, kOfStates, Pass::summary>(args, stream);
            return launch_backward_kernel<T, Narrow, kGroup, kOfStates, Pass::summary>(args, stream);
        }
        if (as_float) return launch_backward_kernel<T, float, kGroup, kOfStates, Pass::output>(args, stream);
        launch_backward_kernel<T, Narrow, kGroup, kOfStates, Pass::output>(args, stream);
    };
    using One = std::integral_constant<int, 1>;
    using Wide = std::integral_constant<int, kWideGroup>;
    if (narrow && states) return run(One{}, std::true_type{});
    if (narrow) return run(One{}, std::false_type{});
    if (states) return run(Wide{}, std::true_type{});
    run(Wide{}, std::false_type{});
}

}  // namespace vmamba::cuda

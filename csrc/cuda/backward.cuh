// The backward scan for one state a channel: a block walks its chunk from the last page to the first. Per page it
// recomputes the states from checkpoints, then runs the recurrence of the state's gradient backwards:
//
//     g_t = C_t dy_t + a_{t+1} g_{t+1}          a_t = exp(dt_t A)
//     dC_t = sum over channels of dy_t h_t       dB_t = sum over channels of g_t dt_t u_t
//     du_t = dt_t (g_t . B_t) + D dy_t           ddt_t = u_t (g_t . B_t) + sum over n of A a_t h_{t-1} g_t
//
// A lane has one channel, and everything of its state lives in registers for sixteen steps, between two checkpoints.
// Sums over channels are made within a warp (ChannelSums), then in a fixed order over warps, then over tiles
// (gather.cu). The low-rank factor's gradients are two tensor-core products with the page's tile of step gradients
// (backward_page.cuh).
//
// Steps are in log2 units and B is staged times ln 2, so that dt_t B_t needs no factor. Behind the last step of a chunk
// nothing has a gradient: the chunk is the last one, so none arrives there, and none is read.
#pragma once

#include "backward_page.cuh"

namespace vmamba::cuda {

// What some steps of a channel need of shared memory, in registers.
constexpr int kQuarter = 4;
struct Inputs {
    float step[kQuarter];
    float2 gains[kQuarter];

    template <typename Page, typename Low>
    __device__ __forceinline__ Inputs(const Page& own, const PageStore<Low>& page, int t, int column) {
#pragma unroll
        for (int i = 0; i < kQuarter; ++i) {
            step[i] = own.delta[(t + i) * own.stride + column];
            gains[i] = *reinterpret_cast<const float2*>(page.gains + (t + i) * 2);
        }
    }
};

// Pass::summary: what a chunk hands to the one before it if nothing arrives from behind, and how much of an arriving
// gradient survives. Pass::output: all gradients.
template <typename T, typename Grad, bool OfStates, Pass pass>
__global__ void __launch_bounds__(192, 2) backward_kernel(const __grid_constant__ BackwardArgs args) {
    using Page = BackwardPage<T>;
    constexpr bool kExact = std::is_same_v<T, float>;
    const Scan& s = args.scan;
    const Cut& cut = args.cut;
    const int directions = static_cast<int>(s.directions);
    const Place place = place_of_block(cut.tiles, cut.chunks, directions);
    const int direction = place.slice, first_channel = place.tile * cut.tile;
    const int column = threadIdx.x, warp = column / 32, warps = blockDim.x / 32;
    const int64_t channel = first_channel + column;
    const bool active = channel < s.channels;
    const int64_t safe_channel = active ? channel : s.channels - 1;
    const int64_t row = place.image * directions + direction;
    const int rank = static_cast<int>(s.rank), features = rank + 2;

    extern __shared__ __align__(16) float shared[];
    const BackwardShared layout(rank, cut.tile, Page::kPacked);
    const Page own(shared, layout, rank, cut.tile);
    const PageStore<typename Page::Low> page{reinterpret_cast<int*>(shared),
                                             reinterpret_cast<int*>(shared) + kPageSteps, shared + 2 * kPageSteps,
                                             own.low, shared + layout.gains};
    float *delta = own.delta, *sums = shared + layout.sums;
    const int stride = own.stride;
    if (rank) {
        own.stage_weights(s, direction, first_channel);
        clear_low(page.low, own.low_stride());
    }

    const Walk walk(s, place.image, direction);
    const Column<T> u_column(s.u, place.image, direction, safe_channel);
    // The gradient of the result: per position (merged) or per step; for states, per step, channel and state.
    const bool merged = s.result == Result::merged, all_active = first_channel + cut.tile <= s.channels;
    const int64_t grad_base = (merged ? place.image * s.length : row * s.steps) * s.channels + channel;
    const Rows grad_rows{static_cast<const Grad*>(args.grad) + grad_base - channel, 0, 0, s.channels};
    const Column<Grad> grad_column(grad_rows, 0, 0, safe_channel);

    const int64_t carry_at = (row * cut.chunks + place.chunk) * s.channels + channel;
    const float A = active ? s.A.data[direction * s.A.direction_stride + channel] : 0.f, natural_A = A * kLn2;
    float g = pass == Pass::output && args.carry && active ? args.carry[carry_at] : 0.f, dA = 0.f;
    const Stepper<kExact> stepper(s.dt_bias, direction, safe_channel, s.dt_softplus);
    const float skip = s.D.data && active && !OfStates ? s.D.data[direction * s.D.direction_stride + channel] : 0.f;
    const uint32_t du_stride = static_cast<uint32_t>(s.channels * sizeof(T));
    ChannelSums<T> channel_sums;  // dB / ln 2 and dC
    float d_skip = 0.f, d_bias = 0.f, elapsed = 0.f, dropped = 0.f;

    const int64_t begin = place.chunk * cut.chunk_steps;
    const int64_t end = min(begin + cut.chunk_steps, s.steps);
    const int64_t pages = end > begin ? (end - begin + kPageSteps - 1) / kPageSteps : 0;
    // Parameter gradients of this block's chunk: (3 + R) rows of D, from the tile's first channel.
    float* params = pass == Pass::summary ? nullptr
                                          : args.params +
                                                ((place.image * cut.chunks + place.chunk) * directions + direction) *
                                                    (3 + rank) * s.channels +
                                                first_channel;
    for (int64_t i = pages - 1; i >= 0; --i) {
        const int64_t at = begin + i * kPageSteps;
        const int count = static_cast<int>(min(static_cast<int64_t>(kPageSteps), end - at));
        const int spans = (count + kSpan - 1) / kSpan;
        __syncthreads();
        stage_positions(page, walk, at, count);
        __syncthreads();
        own.stage_rows(page, s, place.image, direction, args.rows_in_pairs);
        // Every position is read and written, by every channel: no load depends on its own position.
        const bool whole = __syncthreads_and((threadIdx.x >= kPageSteps || page.at[threadIdx.x] >= 0) &&
                                             (blockDim.x >= kPageSteps || page.at[threadIdx.x + 32] >= 0)) &&
                           all_active && merged && !OfStates;
        const int silent = active ? 0 : -1;  // makes every position of a channel behind the last one negative
        const auto read_u = [&](T(&u)[kSpan], int t) {
            if (whole) {
#pragma unroll
                for (int j = 0; j < kSpan; ++j) u[j] = u_column.at(page.at[t + j]);
                return;
            }
#pragma unroll
            for (int j = 0; j < kSpan; ++j) u[j] = u_column.at_or_zero(page.at[t + j] | silent);
        };
        const auto read_grad = [&](Grad(&dy)[kSpan], int t) {
            if (whole) {
#pragma unroll
                for (int j = 0; j < kSpan; ++j) dy[j] = grad_column.at(page.at[t + j]);
                return;
            }
#pragma unroll
            for (int j = 0; j < kSpan; ++j) {
                const int step = t + j, p = page.at[step] | silent;
                const int grad_row = merged ? p : static_cast<int>(at) + step;
                dy[j] = from_float<Grad>(0.f);
                if (p >= 0 && !OfStates) dy[j] = grad_column.at(grad_row);
            }
        };
        const auto as_floats = [](auto& to, const auto& from) {
#pragma unroll
            for (int j = 0; j < kSpan; ++j) to[j] = to_float(from[j]);
        };
        const auto states_grad = [&](int t) {
            return t < count && active ? load_as(args.grad, grad_base + (at + t) * s.channels, args.grad_dtype) : 0.f;
        };

        const auto checkpoint = [&](int t) {
            if (!active) return 0.f;
            return args.checkpoints[(row * args.checkpoint_count + (at + t) / kSpan) * s.channels + channel];
        };
        T raw_u[kSpan];  // as read; the next span's are on their way while one is worked on
        Grad raw_dy[kSpan];
        read_u(raw_u, (spans - 1) * kSpan);
        read_grad(raw_dy, (spans - 1) * kSpan);
        float h = checkpoint((spans - 1) * kSpan);

        own.expand(page, s, place.image, direction, first_channel, count);
        __syncwarp();
        for (int t = 0; t < count; t += kSpan) {
            // All are read before the first is written: the compiler cannot tell that rows of delta are apart.
            float step[kSpan];
#pragma unroll
            for (int j = 0; j < kSpan; ++j) step[j] = delta[(t + j) * stride + column];
#pragma unroll
            for (int j = 0; j < kSpan; ++j) delta[(t + j) * stride + column] = stepper.step(step[j]);
        }
        for (int t = count; t < spans * kSpan; ++t) delta[t * stride + column] = 0.f;

        if constexpr (pass == Pass::summary) {
            for (int span = spans - 1; span >= 0; --span) {
                const int t = span * kSpan;
                float dy[kSpan];
                read_grad(raw_dy, t);
                as_floats(dy, raw_dy);
#pragma unroll
                for (int j = kSpan - 1; j >= 0; --j) {
                    const float step = delta[(t + j) * stride + column];
                    const float drop = walk.reset ? page.drop[t + j] : 0.f;
                    const float from_result = OfStates ? states_grad(t + j) : page.gains[(t + j) * 2 + 1] * dy[j];
                    elapsed += step;
                    dropped += drop;
                    g = (g + from_result) * exp2_fast(fmaf(step, A, drop));
                }
            }
            continue;
        }

        // Backwards, a span at a time.
        for (int span = spans - 1; span >= 0; --span) {
            const int t = span * kSpan;
            float u[kSpan], dy[kSpan], next_h = 0.f;
            as_floats(u, raw_u);
            as_floats(dy, raw_dy);
            if (span > 0) {
                read_u(raw_u, t - kSpan);
                read_grad(raw_dy, t - kSpan);
                next_h = checkpoint(t - kSpan);
            }
            float decay[kSpan], before[kSpan];  // and the state before each step
#pragma unroll
            for (int j = 0; j < kSpan; ++j) decay[j] = exp2_fast(delta[(t + j) * stride + column] * A);
            if (walk.reset) {
#pragma unroll
                for (int j = 0; j < kSpan; ++j)
                    if (page.drop[t + j] != 0.f) decay[j] = 0.f;
            }
#pragma unroll
            for (int j = 0; j < kSpan; ++j) {
                before[j] = h;
                h = fmaf(decay[j], h, delta[(t + j) * stride + column] * u[j] * page.gains[(t + j) * 2]);
            }
            char* du = reinterpret_cast<char*>(static_cast<T*>(args.du) + (row * args.du_steps + at + t) * s.channels +
                                               channel);
            Inputs inputs(own, page, t + kSpan - kQuarter, column);
#pragma unroll
            for (int quarter = kSpan / kQuarter - 1; quarter >= 0; --quarter) {
                const int first = quarter * kQuarter;
                float raw_grads[kQuarter];
#pragma unroll
                for (int i = kQuarter - 1; i >= 0; --i) {
                    const int j = first + i;
                    const float step = inputs.step[i];
                    const float2 gains = inputs.gains[i];  // B and C
                    g = OfStates ? g + states_grad(t + j) : fmaf(gains.y, dy[j], g);
                    channel_sums.add(j % 8, g * (step * u[j]), dy[j] * h);
                    const float through_gain = g * gains.x;
                    g *= decay[j];
                    h = before[j];
                    const float on_exponent = g * h;
                    dA = fmaf(on_exponent, step, dA);
                    // Gradients of u and of the raw step.
                    const float u_grad = fmaf(through_gain, step, skip * dy[j]);
                    raw_grads[i] = fmaf(through_gain, u[j], on_exponent * natural_A) * stepper.slope_per_ln2(step);
                    d_skip = fmaf(dy[j], u[j], d_skip);
                    d_bias += raw_grads[i];
                    if (active) store_global(offset_by(du, j, du_stride), from_float<T>(u_grad));
                }
                // Read before the gradients are written, behind which no read could be moved.
                if (quarter > 0) inputs = Inputs(own, page, t + first - kQuarter, column);
#pragma unroll
                for (int i = 0; i < kQuarter; i += 2) own.keep(t + first + i, column, raw_grads[i], raw_grads[i + 1]);
                if (first % 8 == 0) channel_sums.store(sums, t + first, warp, warps);
            }
            h = next_h;
        }

        __syncthreads();
        float* rows = args.rows + ((row * cut.tiles + place.tile) * s.steps + at) * features;
        for (int v = threadIdx.x; v < count * 2; v += blockDim.x) {
            float total = 0.f;
            for (int w = 0; w < warps; ++w) total += sums[(v / 2 * warps + w) * 2 + v % 2];
            rows[v / 2 * features + rank + v % 2] = v % 2 ? total : total * kLn2;
        }
        if (rank == 0) {
            T* ddt = static_cast<T*>(args.ddt) + (row * s.steps + at) * s.channels + channel;
            for (int t = 0; t < count && active; ++t) ddt[t * s.channels] = own.kept(t, column);
        } else {
            own.store_row_grads(rows, features, count);
            own.add_weight_grads(params + 3 * s.channels, s.channels - first_channel, s.channels, i == pages - 1,
                                 count);
        }
    }

    if (!active) return;
    if constexpr (pass == Pass::summary) {
        args.carry_out[carry_at] = g;
        args.decay[carry_at] = exp2_fast(fmaf(elapsed, A, dropped));
    } else {
        params[column] = dA * kLn2;
        params[s.channels + column] = d_skip;
        params[2 * s.channels + column] = d_bias;
        if (pages == 0)
            for (int r = 0; r < rank; ++r) params[(3 + r) * s.channels + column] = 0.f;
    }
}

template <typename T, typename Grad, bool OfStates, Pass pass>
void launch_backward_kernel(const BackwardArgs& args, cudaStream_t stream) {
    const Cut& cut = args.cut;
    const int64_t blocks = args.scan.batch * args.scan.directions * cut.tiles * cut.chunks;
    const int64_t bytes = BackwardShared(static_cast<int>(args.scan.rank), cut.tile, BackwardPage<T>::kPacked).bytes;
    launch(backward_kernel<T, Grad, OfStates, pass>, blocks, cut.tile, bytes, stream, args);
}

// One compilation unit per input dtype instantiates this.
template <typename T>
void backward_pass(const BackwardArgs& args, Pass pass, cudaStream_t stream) {
    const auto run = [&](auto grad, auto of_states) {
        using Grad = decltype(grad);
        constexpr bool kOfStates = decltype(of_states)::value;
        if (pass == Pass::summary) return launch_backward_kernel<T, Grad, kOfStates, Pass::summary>(args, stream);
        launch_backward_kernel<T, Grad, kOfStates, Pass::output>(args, stream);
    };
    // Gradients of states are read as they come, of channels as float or T.
    if (args.scan.result == Result::states) return run(float{}, std::true_type{});
    if (args.grad_dtype == Scalar::f32) return run(float{}, std::false_type{});
    run(T{}, std::false_type{});
}

}  // namespace vmamba::cuda

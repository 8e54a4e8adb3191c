// The forward scan for every case: one thread walks one channel of one slice over one chunk, a page at a time; or two
// do, neighbours by half a warp, with half of the states each.
//
// A page's rows (low-rank steps, B, C) are staged in shared memory by the block; steps are expanded from their low-rank
// factor on tensor cores; u is read along the route, coalesced over channels, eight steps ahead. Results are written in
// step order, one row per slice; a later gather sums directions and visits in a fixed order.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {

constexpr int kAhead = 8;  // steps whose inputs a thread reads ahead and unrolls

template <typename T>
__device__ __forceinline__ void read_ahead(T (&u)[kAhead], const int* at, const Column<T>& column) {
    int4 positions[kAhead / 4];
#pragma unroll
    for (int j = 0; j < kAhead / 4; ++j) positions[j] = reinterpret_cast<const int4*>(at)[j];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
        const int4 four = positions[j / 4];
        u[j] = column.at_or_zero(j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w);
    }
}

// The states of a channel, as they lie side by side: four at a time where all are there.
template <int Group>
__device__ __forceinline__ void store_states(float* to, const float (&h)[Group], int64_t count) {
    if constexpr (Group % 4 == 0) {
        if (count == Group && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
            for (int n = 0; n < Group; n += 4)
                *reinterpret_cast<float4*>(to + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
            return;
        }
    }
#pragma unroll
    for (int n = 0; n < Group; ++n)
        if (n < count) to[n] = h[n];
}

// Pass::summary: the chunk's end state from zero, and its decay. Pass::output: from the carried state to the results.
template <typename T, int Group, typename Out, Pass pass, bool OfStates, int Lanes>
__global__ void __launch_bounds__(kScanThreads) forward_kernel(const __grid_constant__ ForwardArgs args) {
    constexpr int kWidth = 32 / Lanes, kStates = Group / Lanes;  // channels of a warp, states of a thread
    const Scan& s = args.scan;
    const Cut& cut = args.cut;
    const int slices = static_cast<int>(s.directions) * cut.groups;
    const Place place = place_of_block(cut.tiles, cut.chunks, slices);
    const int part = Lanes == 1 ? 0 : threadIdx.x % 32 / kWidth;
    const int direction = place.slice / cut.groups, first_of_group = place.slice % cut.groups * Group;
    const int first_state = first_of_group + part * kStates;
    const int first_channel = place.tile * cut.tile;
    const int warp_channel = threadIdx.x / 32 * kWidth, column = warp_channel + threadIdx.x % kWidth;
    const int64_t channel = first_channel + column;
    const bool active = channel < s.channels;
    const int64_t safe_channel =
        active ? channel : s.channels - 1;  // read, but not written, by threads behind the last
    const int64_t row = place.image * slices + place.slice;

    extern __shared__ __align__(16) float shared[];
    const ForwardShared layout(static_cast<int>(s.rank), Group, cut.tile);
    const PageStore<> page{reinterpret_cast<int*>(shared), reinterpret_cast<int*>(shared) + kPageSteps,
                           shared + 2 * kPageSteps, shared + layout.low, shared + layout.gains};
    float* weights = shared + layout.weights;
    float* delta = shared + layout.delta;
    const int stride = delta_stride(cut.tile);
    if (s.rank) stage_weights<std::is_same_v<T, float>>(weights, s, direction, first_channel, cut.tile);

    constexpr bool kExact = std::is_same_v<T, float>;
    constexpr int64_t kInterval = checkpoint_interval(Group);  // between checkpoints
    const Walk walk(s, place.image, direction);
    const Column<T> u_column(s.u, place.image, direction, safe_channel);
    float A[kStates], h[kStates];
    const int64_t states_here = min(static_cast<int64_t>(kStates), s.states - first_state);
    const int64_t carry_at = ((row * cut.chunks + place.chunk) * s.channels + channel) * Group + part * kStates;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
        const bool there = active && n < states_here;
        A[n] = there ? s.A.data[direction * s.A.direction_stride + channel * s.states + first_state + n] : 0.f;
        h[n] = pass == Pass::output && args.carry && active ? args.carry[carry_at + n] : 0.f;
    }
    const Stepper<kExact> stepper(s.dt_bias, direction, safe_channel, s.dt_softplus);
    const float skip = s.D.data && active && first_state == 0 && !OfStates
                           ? s.D.data[direction * s.D.direction_stride + channel]
                           : 0.f;
    float elapsed = 0.f, dropped = 0.f;

    // Rows of the result and checkpoints are written one after the other: walking pointers.
    const uint32_t out_stride = static_cast<uint32_t>(s.channels * (OfStates ? s.states : 1) * sizeof(Out));
    const int64_t out_rows = OfStates ? place.image * s.directions + direction : row;
    const int64_t begin = place.chunk * cut.chunk_steps;
    const int64_t end = min(begin + cut.chunk_steps, s.steps);
    char* out =
        reinterpret_cast<char*>(static_cast<Out*>(args.out) +
                                ((out_rows * s.steps + begin) * s.channels + channel) * (OfStates ? s.states : 1) +
                                (OfStates ? first_state : 0));
    float* kept =
        args.checkpoints
            ? args.checkpoints +
                  (((place.image * s.directions + direction) * args.checkpoint_count + begin / kInterval) * s.channels +
                   channel) *
                      s.states +
                  first_state
            : nullptr;
    if (s.rank) clear_low(page.low, rank_stride(static_cast<int>(s.rank)));
    for (int64_t at = begin; at < end; at += kPageSteps) {
        const int count = static_cast<int>(min(static_cast<int64_t>(kPageSteps), end - at));
        __syncthreads();
        stage_positions(page, walk, at, count);
        __syncthreads();
        stage_rows<T, Group>(page, rank_stride(static_cast<int>(s.rank)), s, place.image, direction, first_of_group);
        T u[kAhead];
        read_ahead(u, page.at, u_column);
        __syncthreads();
        expand_steps<T, kWidth>(delta, stride, page, weights, s, place.image, direction, first_channel, warp_channel,
                                count);
        __syncwarp();

        // One span of eight steps; a whole one needs no look at the end of the chunk.
        const auto run = [&](int t, auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
            T next_u[kAhead];
            read_ahead(next_u, page.at + min(t + kAhead, kPageSteps - kAhead), u_column);
            if (pass == Pass::output && kept && t % kInterval == 0) {
                if (active) store_states(kept, h, states_here);
                kept += s.channels * s.states;
            }
            float y[kAhead] = {};
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                if (!kWhole && t + j >= count) break;
                const float input = to_float(u[j]);
                const float step = stepper.step(delta[(t + j) * stride + column]);
                const float gain = step * kLn2 * input;
                const float drop = walk.reset ? page.drop[t + j] : 0.f;
                const float* gains = page.gains + (t + j) * 2 * Group + part * kStates;
                float B[kStates], C[kStates];
                load_floats(B, gains);
                if constexpr (pass == Pass::output) load_floats(C, gains + Group);
                y[j] = skip * input;
                if constexpr (pass == Pass::summary) {
                    elapsed += step;
                    dropped += drop;
                }
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const float decay = exp2_fast(fmaf(step, A[n], drop));
                    h[n] = fmaf(decay, h[n], gain * B[n]);
                    if constexpr (pass == Pass::output && !OfStates) y[j] = fmaf(C[n], h[n], y[j]);
                }
                if constexpr (pass == Pass::output && OfStates) {
                    char* to = offset_by(out, j, out_stride);
#pragma unroll
                    for (int n = 0; n < kStates; ++n)
                        if (active && n < states_here) store_global(to + n * sizeof(Out), from_float<Out>(h[n]));
                }
            }
            if constexpr (pass == Pass::output && !OfStates) {
                // Of every so many steps as a channel has threads, each ends with the sum for one.
#pragma unroll
                for (int j = 0; j < kAhead; j += Lanes) {
                    float total = y[j];
                    if constexpr (Lanes == 2) {
                        const float other = __shfl_xor_sync(kFullWarp, part ? y[j] : y[j + 1], kWidth);
                        total = (part ? y[j + 1] : y[j]) + other;
                    }
                    if (active && (kWhole || t + j + part < count))
                        store_global(offset_by(out, j + part, out_stride), from_float<Out>(total));
                }
            }
            out += static_cast<uint64_t>(kAhead) * out_stride;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) u[j] = next_u[j];
        };
        int t = 0;
        for (; t + kAhead <= count; t += kAhead) run(t, std::true_type{});
        if (t < count) run(t, std::false_type{});
    }
    if (pass == Pass::summary && active) {
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            args.carry_out[carry_at + n] = h[n];
            args.decay[carry_at + n] = exp2_fast(fmaf(elapsed, A[n], dropped));
        }
    }
}

template <typename T, int Group, typename Out, Pass pass, bool OfStates = false, int Lanes = 1>
void launch_forward_kernel(const ForwardArgs& args, cudaStream_t stream) {
    const Cut& cut = args.cut;
    const int64_t blocks = args.scan.batch * args.scan.directions * cut.groups * cut.tiles * cut.chunks;
    const int64_t bytes = ForwardShared(static_cast<int>(args.scan.rank), Group, cut.tile).bytes;
    launch(forward_kernel<T, Group, Out, pass, OfStates, Lanes>, blocks, cut.tile * Lanes, bytes, stream, args);
}

template <typename T, int Group, typename Out>
void output_pass(const ForwardArgs& args, cudaStream_t stream) {
    if (args.scan.result == Result::states)
        return launch_forward_kernel<T, Group, Out, Pass::output, true>(args, stream);
    if constexpr (Group > 1) {
        if (args.cut.lanes == 2) return launch_forward_kernel<T, Group, Out, Pass::output, false, 2>(args, stream);
    }
    launch_forward_kernel<T, Group, Out, Pass::output>(args, stream);
}

// One compilation unit per input dtype instantiates this.
template <typename T>
void forward_pass(const ForwardArgs& args, Pass pass, bool float_out, cudaStream_t stream) {
    const bool narrow = args.cut.group == 1;
    if (pass == Pass::summary) {
        if (narrow) return launch_forward_kernel<T, 1, float, Pass::summary>(args, stream);
        return launch_forward_kernel<T, kWideGroup, float, Pass::summary>(args, stream);
    }
    if (float_out || std::is_same_v<T, float>) {
        if (narrow) return output_pass<T, 1, float>(args, stream);
        return output_pass<T, kWideGroup, float>(args, stream);
    }
    if (narrow) return output_pass<T, 1, T>(args, stream);
    output_pass<T, kWideGroup, T>(args, stream);
}

}  // namespace vmamba::cuda

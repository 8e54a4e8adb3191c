// The forward scan with one state, for 16-bit maps that fit in shared memory: all directions in one block, merged on chip.
//
// A block owns 16 channels of one image and keeps their merged result, (L, 16) floats, in shared memory; it takes one
// direction after the other. A warp takes tiles of 32 steps: lane g * 4 + q walks steps 8 q .. 8 q + 7 of channels 2g and
// 2g + 1 from a zero state. Linearity does the rest: with P_t the product of decays since the lane's first step,
//
//     h_t = (h_t from zero) + P_t h_start        y_t = (y_t from zero) + C_t P_t h_start
//
// so once the lanes' and then the warps' end states are chained, each result needs one more multiply-add. Tensor cores
// expand the low-rank steps: with channels as rows and steps as columns, lane (g, q) of a product gets exactly its own
// channels and steps; and they spread B and C to the lanes, by rows of weights that pick one feature each.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {

constexpr int kFusedChannels = 16;
constexpr int kLaneSteps = 8;
constexpr int kTileSteps = 4 * kLaneSteps;
static_assert(kTileSteps == kFusedTileSteps);

// Two neighbouring 16-bit numbers in a register.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// acc (16 x 8) += a (16 x 16) * b (16 x 8). Lane g * 4 + q holds a at {(g, 2q), (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8)}
// and b at {(2q, g), (2q + 8, g)}, each with its right or lower neighbour; acc as for tf32.
template <typename T>
__device__ __forceinline__ void mma_16bit(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

template <typename T>
__device__ __forceinline__ void load_lane_steps(T (&x)[kLaneSteps], const T* from) {
#pragma unroll
    for (int i = 0; i < kLaneSteps; i += 4) {
        const int4 four = __ldg(reinterpret_cast<const int4*>(from + i));
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
}

// The weights of one direction as a-operands: high and low halves, so that they keep 16 bits or more; and the picker of B
// and C, the two features behind the low-rank ones. Rows are channels 0, 2, .. 14, 1, 3, .. 15.
template <typename T, int Blocks, bool Small>
struct Weights {
    uint32_t high[Blocks][4], low[Blocks][4], pick[4];

    __device__ void load(const Scan& s, int direction, int64_t first_channel, int g, int q) {
        const int rank = static_cast<int>(s.rank);
        const float* source = s.dt_weight.data + direction * s.dt_weight.direction_stride + first_channel * rank;
#pragma unroll
        for (int b = 0; b < Blocks; ++b) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int channel = 2 * g + i % 2, feature = b * 16 + 2 * q + (Small ? 0 : i / 2 * 8);
                float2 w = make_float2(0.f, 0.f);
                if (feature < rank) w = *reinterpret_cast<const float2*>(source + channel * rank + feature);
                w.x *= kLog2e, w.y *= kLog2e;
                high[b][i] = pack<T>(w.x, w.y);
                const float2 rounded = unpack<T>(high[b][i]);
                low[b][i] = pack<T>(w.x - rounded.x, w.y - rounded.y);
            }
        }
        if constexpr (Small) {
            // Eight features fill half an operand: the other half holds the low parts, for one product instead of two.
            high[0][2] = low[0][2], high[0][3] = low[0][3];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool here = rank % 16 == 2 * q + i / 2 * 8;
            pick[i] = here ? (i % 2 == 0 ? pack<T>(1.f, 0.f) : pack<T>(0.f, 1.f)) : 0;
        }
    }
};

template <typename T, int Blocks, bool Small, typename Out>
__global__ void __launch_bounds__(32 * kFusedWarps, 1) fused_forward_kernel(const __grid_constant__ FusedArgs args) {
    const Scan& s = args.scan;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, q = lane % 4;
    const int64_t tiles = s.channels / kFusedChannels;
    const int64_t image = blockIdx.x / tiles, first_channel = blockIdx.x % tiles * kFusedChannels;
    const int rank = static_cast<int>(s.rank), steps = static_cast<int>(s.steps), length = static_cast<int>(s.length);

    extern __shared__ __align__(128) char shared_bytes[];
    char* merged = shared_bytes;
    // Per round parity, warp and channel pair: decay and end state of both channels.
    float4* ends = reinterpret_cast<float4*>(shared_bytes + fused_merged_bytes(length));
    for (int i = threadIdx.x; i < fused_merged_bytes(length) / 16; i += blockDim.x)
        reinterpret_cast<float4*>(merged)[i] = make_float4(0.f, 0.f, 0.f, 0.f);

    const Column<T> u_column(s.u, image, 0, first_channel + 2 * g);
    const int rounds = static_cast<int>(args.route.padded) / (kTileSteps * warps);
    const int turns = rounds * static_cast<int>(s.directions);

    // Whether every step of this warp's tile reads and writes a position: then nothing needs a look.
    const auto is_whole = [&](int turn) {
        return !(args.route.flags[turn / rounds] & kSomeNowhere) &&
               (turn % rounds * warps + warp + 1) * kTileSteps <= steps;
    };
    // The channel pair of u at this lane's steps of a turn.
    const auto read_u = [&](uint32_t (&u)[kLaneSteps], int turn) {
        int places[kLaneSteps];
        load_lane_steps(places, args.route.places + turn / rounds * args.route.padded +
                                 (turn % rounds * warps + warp) * kTileSteps + q * kLaneSteps);
#pragma unroll
        for (int i = 0; i < kLaneSteps; ++i)
            u[i] = __ldg(reinterpret_cast<const uint32_t*>(offset_by(u_column.data, max(places[i], 0), u_column.stride)));
        if (is_whole(turn)) return;
#pragma unroll
        for (int i = 0; i < kLaneSteps; ++i)
            if (places[i] < 0) u[i] = 0;
    };

    // The b-operands of the products of a turn: column g is step 8 (g / 2) + 2 j + g % 2 of the tile. Where they are few,
    // they are read a turn ahead, like u.
    constexpr int kProducts = kLaneSteps / 2, kWords = Small ? 1 : 2 * Blocks;
    constexpr bool kReadAhead = Blocks <= 2;
    const auto read_row = [&](uint32_t (&words)[kWords], int place, const Column<T>& rows) {
        const char* row = offset_by(rows.data + 4 * q, max(place, 0), rows.stride);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            words[i] = 0;
            if (place >= 0 && 2 * q + 8 * i < rank + 2)
                words[i] = __ldg(reinterpret_cast<const uint32_t*>(row + i * 16));
        }
    };
    const auto read_rows = [&](uint32_t (&words)[kProducts][kWords], int turn) {
        const int32_t* columns = args.route.places + turn / rounds * args.route.padded +
                                 (turn % rounds * warps + warp) * kTileSteps + g / 2 * kLaneSteps + g % 2;
        const Column<T> rows(s.dt, image, turn / rounds, 0);
        int places[kProducts];
#pragma unroll
        for (int j = 0; j < kProducts; ++j) places[j] = __ldg(columns + 2 * j);
#pragma unroll
        for (int j = 0; j < kProducts; ++j) read_row(words[j], places[j], rows);
    };

    uint32_t ahead[kReadAhead ? kProducts : 1][kWords];
    if constexpr (kReadAhead) read_rows(ahead, 0);
    Weights<T, Blocks, Small> weights;
    float bias[2], A[2], skip[2], carry[2];
    uint32_t next_u[kLaneSteps];
    read_u(next_u, 0);
    for (int turn = 0; turn < turns; ++turn) {
        const int direction = turn / rounds, round = turn % rounds;
        const int first = (round * warps + warp) * kTileSteps;
        if (round == 0) {
            weights.load(s, direction, first_channel, g, q);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int64_t channel = first_channel + 2 * g + c;
                bias[c] = s.dt_bias.data ? s.dt_bias.data[direction * s.dt_bias.direction_stride + channel] * kLog2e : 0.f;
                A[c] = s.A.data[direction * s.A.direction_stride + channel];
                skip[c] = s.D.data ? s.D.data[direction * s.D.direction_stride + channel] : 0.f;
                carry[c] = 0.f;
            }
        }
        const int64_t at = direction * args.route.padded + first;
        const Column<T> rows(s.dt, image, direction, 0);
        const int lane_first = first + q * kLaneSteps;

        // From zero: results y, their sensitivity z to the state before the lane's first step, decay and end state.
        float y[kLaneSteps][2], z[kLaneSteps][2], decay[2] = {1.f, 1.f}, end[2] = {0.f, 0.f};
        const auto walk = [&](auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
            const int32_t* columns = args.route.places + at + g / 2 * kLaneSteps + g % 2;
#pragma unroll
            for (int j = 0; j < kProducts; ++j) {
                uint32_t words[kWords];
                if constexpr (kReadAhead) {
#pragma unroll
                    for (int i = 0; i < kWords; ++i) words[i] = ahead[j][i];
                } else {
                    read_row(words, __ldg(columns + 2 * j), rows);
                }
                float x[4] = {bias[0], bias[0], bias[1], bias[1]}, bc[4] = {};
                if constexpr (Small) {
                    mma_16bit<T>(x, weights.high[0], words[0], words[0]);
                    mma_16bit<T>(bc, weights.pick, words[0], 0);
                } else {
#pragma unroll
                    for (int b = 0; b < Blocks; ++b) {
                        mma_16bit<T>(x, weights.low[b], words[2 * b], words[2 * b + 1]);
                        mma_16bit<T>(x, weights.high[b], words[2 * b], words[2 * b + 1]);
                        if (b == rank / 16) mma_16bit<T>(bc, weights.pick, words[2 * b], words[2 * b + 1]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int t = 2 * j + i;
                    const float2 pair = unpack<T>(next_u[t]);
                    const float gain = bc[i] * kLn2, C = bc[2 + i];
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float raw = x[2 * c + i], e = exp2_fast(-fabsf(raw));
                        float step = fmaf(e, log2_1p_ratio<false>(e), fmaxf(raw, 0.f));
                        if (!kWhole && lane_first + t >= steps) step = 0.f;
                        const float input = c == 0 ? pair.x : pair.y;
                        const float a = exp2_fast(step * A[c]);
                        end[c] = fmaf(a, end[c], gain * input * step);
                        decay[c] *= a;
                        y[t][c] = fmaf(C, end[c], skip[c] * input);
                        z[t][c] = C * decay[c];
                    }
                }
            }
        };
        const bool whole = is_whole(turn);
        if (whole) {
            walk(std::true_type{});
        } else {
            walk(std::false_type{});
        }
        if (turn + 1 < turns) {
            read_u(next_u, turn + 1);
            if constexpr (kReadAhead) read_rows(ahead, turn + 1);
        }

        // Chain the four lanes of a channel pair: what enters this lane, and what leaves the last.
        float into_decay[2], into_end[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float d = decay[c], e = end[c];
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {
                const float before_d = __shfl_up_sync(kFullWarp, d, distance, 4);
                const float before_e = __shfl_up_sync(kFullWarp, e, distance, 4);
                if (q >= distance) e = fmaf(d, before_e, e), d *= before_d;
            }
            into_decay[c] = __shfl_up_sync(kFullWarp, d, 1, 4);
            into_end[c] = __shfl_up_sync(kFullWarp, e, 1, 4);
            if (q == 0) into_decay[c] = 1.f, into_end[c] = 0.f;
            decay[c] = d, end[c] = e;
        }
        float4* here = ends + (turn & 1) * warps * 8;
        if (q == 3) here[warp * 8 + g] = make_float4(decay[0], end[0], decay[1], end[1]);
        __syncthreads();

        // Chain the warps.
        float start[2] = {carry[0], carry[1]};
        for (int w = 0; w < warps; ++w) {
            if (w == warp) start[0] = carry[0], start[1] = carry[1];
            const float4 e = here[w * 8 + g];
            carry[0] = fmaf(e.x, carry[0], e.y);
            carry[1] = fmaf(e.z, carry[1], e.w);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) start[c] = fmaf(into_decay[c], start[c], into_end[c]);

        if (args.checkpoints && lane_first < steps && q % 2 == 0) {
            float* kept = args.checkpoints +
                          ((image * s.directions + direction) * args.checkpoint_count + lane_first / checkpoint_interval(1)) *
                              s.channels + first_channel + 2 * g;
            *reinterpret_cast<float2*>(kept) = make_float2(start[0], start[1]);
        }

        const auto add = [&](auto all) {
            uint32_t offsets[kLaneSteps];
            int places[kLaneSteps];
            load_lane_steps(offsets, args.route.offsets + at + q * kLaneSteps);
            if (!decltype(all)::value) load_lane_steps(places, args.route.places + at + q * kLaneSteps);
#pragma unroll
            for (int i = 0; i < kLaneSteps; ++i) {
                if (!decltype(all)::value && places[i] < 0) continue;
                float2* to = reinterpret_cast<float2*>(merged + (offsets[i] ^ 8 * g));
                const float2 sum = *to;
                *to = make_float2(fmaf(z[i][0], start[0], sum.x + y[i][0]), fmaf(z[i][1], start[1], sum.y + y[i][1]));
            }
        };
        if (!(args.route.flags[direction] & kRevisits)) {
            if (whole) {
                add(std::true_type{});
            } else {
                add(std::false_type{});
            }
        } else {
            // Steps may share a position: one lane of each channel pair at a time, in the order of the steps.
            for (int w = 0; w < warps; ++w) {
                for (int turn_of = 0; turn_of < 4; ++turn_of) {
                    if (w == warp && q == turn_of) add(std::false_type{});
                    __syncwarp();
                }
                __syncthreads();
            }
        }
    }
    __syncthreads();

    // Out: eight channels a thread.
    Out* out = static_cast<Out*>(args.out) + image * s.length * s.channels + first_channel;
    for (int i = threadIdx.x; i < length * 2; i += blockDim.x) {
        const int p = i / 2, half = i % 2;
        const float4* from = reinterpret_cast<const float4*>(merged + (merged_offset(p) ^ 32 * half));
        const float4 a = from[0], b = from[1];
        Out* to = out + static_cast<int64_t>(p) * s.channels + half * 8;
        if constexpr (std::is_same_v<Out, float>) {
            reinterpret_cast<float4*>(to)[0] = a;
            reinterpret_cast<float4*>(to)[1] = b;
        } else {
            *reinterpret_cast<uint4*>(to) =
                make_uint4(pack<Out>(a.x, a.y), pack<Out>(a.z, a.w), pack<Out>(b.x, b.y), pack<Out>(b.z, b.w));
        }
    }
}

template <typename T, int Blocks, bool Small, typename Out>
void launch_fused(const FusedArgs& args, cudaStream_t stream) {
    const Scan& s = args.scan;
    const int warps = fused_warps(s.steps, s.length);
    launch(fused_forward_kernel<T, Blocks, Small, Out>, s.batch * (s.channels / kFusedChannels), warps * 32,
           fused_shared_bytes(s.length), stream, args);
}

// One compilation unit per input dtype instantiates this.
template <typename T>
void fused_forward(const FusedArgs& args, bool float_out, cudaStream_t stream) {
    const int64_t features = args.scan.rank + 2;
    const auto run = [&](auto blocks, auto small) {
        constexpr int kBlocks = decltype(blocks)::value;
        constexpr bool kSmall = decltype(small)::value;
        if (float_out) return launch_fused<T, kBlocks, kSmall, float>(args, stream);
        launch_fused<T, kBlocks, kSmall, T>(args, stream);
    };
    if (features <= 8) return run(std::integral_constant<int, 1>{}, std::true_type{});
    if (features <= 16) return run(std::integral_constant<int, 1>{}, std::false_type{});
    if (features <= 32) return run(std::integral_constant<int, 2>{}, std::false_type{});
    run(std::integral_constant<int, 4>{}, std::false_type{});
}

}  // namespace vmamba::cuda

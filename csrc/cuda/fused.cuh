// The forward scan with one state, for 16-bit maps that fit in shared memory: all directions in one block, merged on
// chip.
//
// A block owns 16 channels of one image and keeps their merged result, (L, 16) floats, in shared memory; it takes one
// direction after the other. A warp takes tiles of 64 or 32 steps: lane g * 4 + q walks a quarter of them, one after
// the other, for channels 2g and 2g + 1, from a zero state. Linearity does the rest: with P_t the product of decays
// since the lane's first step,
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

// States that one warp hands to another through shared memory, each in one word with the turn they belong to: whoever
// reads the turn has read the state, without a fence.
struct Handover {
    unsigned long long state[2];
};
constexpr unsigned long long kNothing = ~0ull;

__device__ __forceinline__ void hand_on(Handover* slot, const float (&states)[2], int turn) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const unsigned long long bits = __float_as_uint(states[c]);
        *reinterpret_cast<volatile unsigned long long*>(&slot->state[c]) = bits << 32 | static_cast<unsigned>(turn);
    }
}

__device__ __forceinline__ void receive(float (&states)[2], const Handover* slot, int turn) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        unsigned long long bits;
        do {
            bits = *reinterpret_cast<const volatile unsigned long long*>(&slot->state[c]);
        } while (static_cast<int>(bits) != turn);
        states[c] = __uint_as_float(static_cast<unsigned>(bits >> 32));
    }
}

// A lane's entries of a 16-bit table, two in a register.
template <int Pairs>
__device__ __forceinline__ void load_lane_steps(uint32_t (&x)[Pairs], const void* from) {
#pragma unroll
    for (int i = 0; i < Pairs / 4; ++i) {
        const uint4 four = __ldg(static_cast<const uint4*>(from) + i);
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
}
__device__ __forceinline__ int signed_half(uint32_t pair, int half) {
    return static_cast<int>(pair << (16 - 16 * half)) >> 16;
}
__device__ __forceinline__ uint32_t unsigned_half(uint32_t pair, int half) { return pair >> (16 * half) & 0xffff; }

// The a-operands of dt_weight: high and low halves, so that they keep 16 bits or more. Rows are channels 0, 2, .. 14,
// 1, 3, .. 15 of a tile. One thread: a lane's part of one operand. Small: eight features fill half an operand, and the
// other half holds their low parts, for one product instead of two.
template <typename T, int Blocks, bool Small>
__global__ void prepare_weights_kernel(const __grid_constant__ FusedArgs args) {
    const Scan& s = args.scan;
    const int rank = static_cast<int>(s.rank), tiles = static_cast<int>(s.channels / kFusedChannels);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = i % 32, g = lane / 4, q = lane % 4, block = i / 32 % Blocks, tile = i / 32 / Blocks % tiles;
    const int direction = i / 32 / Blocks / tiles;
    if (direction >= s.directions) return;
    const float* source = s.dt_weight.data + direction * s.dt_weight.direction_stride;
    uint32_t high[4], low[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int64_t channel = tile * kFusedChannels + 2 * g + j % 2;
        const int feature = block * 16 + 2 * q + (Small ? 0 : j / 2 * 8);
        const bool there = feature < rank;
        const float x = there ? source[channel * rank + feature] * kLog2e : 0.f;
        const float y = there ? source[channel * rank + feature + 1] * kLog2e : 0.f;
        high[j] = pack<T>(x, y);
        const float2 rounded = unpack<T>(high[j]);
        low[j] = pack<T>(x - rounded.x, y - rounded.y);
    }
    uint4* to = args.prepared.weights + (((direction * tiles + tile) * Blocks + block) * (Small ? 1 : 2)) * 32 + lane;
    if constexpr (Small) {
        to[0] = make_uint4(high[0], high[1], low[0], low[1]);
    } else {
        to[0] = make_uint4(high[0], high[1], high[2], high[3]);
        to[32] = make_uint4(low[0], low[1], low[2], low[3]);
    }
}

template <typename T, int Blocks, bool Small, typename Out>
__global__ void __launch_bounds__(32 * fused_most_warps(Small), 1)
    fused_forward_kernel(const __grid_constant__ FusedArgs args) {
    constexpr int kLaneSteps = fused_lane_steps(Small), kTileSteps = 4 * kLaneSteps;
    const Scan& s = args.scan;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, q = lane % 4;
    const int64_t tiles = s.channels / kFusedChannels;
    const int64_t image = blockIdx.x / tiles, first_channel = blockIdx.x % tiles * kFusedChannels;
    const int rank = static_cast<int>(s.rank), steps = static_cast<int>(s.steps), length = static_cast<int>(s.length);

    extern __shared__ __align__(128) char shared_bytes[];
    char* merged = shared_bytes;
    // Per parity of the turn, warp and channel pair: the states behind the warp's tile.
    Handover* handed_on = reinterpret_cast<Handover*>(shared_bytes + fused_merged_bytes(length));
    for (int i = threadIdx.x; i < 2 * warps * 8; i += blockDim.x)
        handed_on[i].state[0] = handed_on[i].state[1] = kNothing;
    for (int i = threadIdx.x; i < fused_merged_bytes(length) / 16; i += blockDim.x)
        reinterpret_cast<float4*>(merged)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    __syncthreads();

    const Column<T> u_column(s.u, image, 0, first_channel + 2 * g);
    const int rounds = static_cast<int>(args.prepared.padded) / (kTileSteps * warps);
    const int turns = rounds * static_cast<int>(s.directions);
    const auto tile_at = [&](int turn) {  // this warp's tile of a turn in the tables
        return turn / rounds * args.prepared.padded + (turn % rounds * warps + warp) * kTileSteps;
    };

    // The channel pair of u at this lane's steps, two places in a register.
    uint32_t u[kLaneSteps];
    const auto read_u = [&](const uint32_t (&places)[kLaneSteps / 2]) {
#pragma unroll
        for (int i = 0; i < kLaneSteps; ++i) {
            const int place = max(signed_half(places[i / 2], i % 2), 0);
            u[i] = __ldg(reinterpret_cast<const uint32_t*>(offset_by(u_column.data, place, u_column.stride)));
        }
    };
    // The b-operands of the products: column g is step 2 j + g % 2 of lane q = g / 2, so its places are every other one
    // of that lane. Where they are few, they are read a turn ahead, like u.
    constexpr int kProducts = kLaneSteps / 2, kWords = Small ? 1 : 2;
    const auto read_rows = [&](uint32_t (&words)[kProducts][kWords], const uint32_t (&columns)[kProducts],
                               int direction, int block) {
        const Column<T> rows(s.dt, image, direction, 0);
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
            const int place = signed_half(columns[j], g % 2);
            const char* row = offset_by(rows.data + 4 * q + block * 32, max(place, 0), rows.stride);
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                words[j][i] = 0;
                if (place >= 0 && block * 16 + 2 * q + 8 * i < rank + 2)
                    words[j][i] = __ldg(reinterpret_cast<const uint32_t*>(row + i * 16));
            }
        }
    };

    // Tables are read a turn before what they point to is read, which is a turn before that is used; but for the rows
    // of many features, for which there are no registers.
    constexpr bool kAhead = Blocks <= 2;
    uint32_t places[kLaneSteps / 2], columns[kProducts], ahead[kAhead ? Blocks : 1][kProducts][kWords];
    load_lane_steps(places, args.prepared.places + tile_at(0) + q * kLaneSteps);
    load_lane_steps(columns, args.prepared.places + tile_at(0) + g / 2 * kLaneSteps);
    read_u(places);
    const auto read_ahead = [&](const uint32_t (&columns)[kProducts], int direction) {
#pragma unroll
        for (int b = 0; b < Blocks; ++b) read_rows(ahead[b], columns, direction, b);
    };
    if constexpr (kAhead) read_ahead(columns, 0);

    // The operand that picks B and C, the two features behind the low-rank ones: B for rows 0 to 7, C for rows 8 to 15.
    uint32_t pick[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool here = rank % 16 == 2 * q + i / 2 * 8;
        pick[i] = here ? (i % 2 == 0 ? pack<T>(1.f, 0.f) : pack<T>(0.f, 1.f)) : 0;
    }
    const auto operands = [&](int direction) {
        return args.prepared.weights +
               (direction * tiles + first_channel / kFusedChannels) * Blocks * (Small ? 1 : 2) * 32 + lane;
    };
    uint4 weights;  // Small
    float bias[2], A[2], skip[2];
    int flags = 0;
    for (int turn = 0; turn < turns; ++turn) {
        const int direction = turn / rounds, round = turn % rounds;
        const int first = (round * warps + warp) * kTileSteps;
        if (round == 0) {
            flags = args.prepared.flags[direction];
            if constexpr (Small) weights = operands(direction)[0];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int64_t channel = first_channel + 2 * g + c;
                bias[c] =
                    s.dt_bias.data ? s.dt_bias.data[direction * s.dt_bias.direction_stride + channel] * kLog2e : 0.f;
                A[c] = s.A.data[direction * s.A.direction_stride + channel];
                skip[c] = s.D.data ? s.D.data[direction * s.D.direction_stride + channel] : 0.f;
            }
        }
        const int lane_first = first + q * kLaneSteps;
        uint32_t offsets[kLaneSteps / 2], next_places[kLaneSteps / 2], next_columns[kProducts];
        const int64_t next_at = tile_at(min(turn + 1, turns - 1));
        // On their way during the walk: offsets for the end of this turn, places and columns of the next.
        load_lane_steps(offsets, args.prepared.offsets + tile_at(turn) + q * kLaneSteps);
        load_lane_steps(next_places, args.prepared.places + next_at + q * kLaneSteps);
        load_lane_steps(next_columns, args.prepared.places + next_at + g / 2 * kLaneSteps);

        // Raw steps of both channels, and B and C, at steps 2 j and 2 j + 1 of this lane.
        float x[kProducts][4], bc[kProducts][4];
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
            x[j][0] = x[j][1] = bias[0], x[j][2] = x[j][3] = bias[1];
            bc[j][0] = bc[j][1] = bc[j][2] = bc[j][3] = 0.f;
        }
        if constexpr (Small) {
            const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
            for (int j = 0; j < kProducts; ++j) {
                mma_16bit<T>(x[j], a, ahead[0][j][0], ahead[0][j][0]);
                mma_16bit<T>(bc[j], pick, ahead[0][j][0], 0);
            }
        } else {
#pragma unroll
            for (int b = 0; b < Blocks; ++b) {
                const uint4 high = operands(direction)[2 * b * 32], low = operands(direction)[(2 * b + 1) * 32];
                const uint32_t a_high[4] = {high.x, high.y, high.z, high.w}, a_low[4] = {low.x, low.y, low.z, low.w};
                auto& rows = ahead[kAhead ? b : 0];
                if constexpr (!kAhead) read_rows(rows, columns, direction, b);
#pragma unroll
                for (int j = 0; j < kProducts; ++j) {
                    mma_16bit<T>(x[j], a_low, rows[j][0], rows[j][kWords - 1]);
                    mma_16bit<T>(x[j], a_high, rows[j][0], rows[j][kWords - 1]);
                    if (b == rank / 16) mma_16bit<T>(bc[j], pick, rows[j][0], rows[j][kWords - 1]);
                }
            }
        }

        // From zero: results y, their sensitivity z to the state before the lane's first step, decay and end state.
        float y[kLaneSteps][2], z[kLaneSteps][2], decay[2] = {1.f, 1.f}, end[2] = {0.f, 0.f};
        const auto walk = [&](auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
#pragma unroll
            for (int j = 0; j < kProducts; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int t = 2 * j + i;
                    const float2 pair = unpack<T>(kWhole || signed_half(places[j], i) >= 0 ? u[t] : 0);
                    const float gain = bc[j][i] * kLn2, C = bc[j][2 + i];
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float raw = x[j][2 * c + i], e = exp2_fast(-fabsf(raw));
                        float step = log2_1p<false>(e) + fmaxf(raw, 0.f);
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
        // Whether every step of the tile is one of the route and visits a position, so that none needs a look.
        const bool whole = first + kTileSteps <= steps && !(flags & kSomeNowhere);
        if (whole) {
            walk(std::true_type{});
        } else {
            walk(std::false_type{});
        }
        read_u(next_places);
        if constexpr (kAhead) read_ahead(next_columns, min(turn + 1, turns - 1) / rounds);

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
        // Chain the warps: each waits for the state that the one before hands on, the first for the last one's of the
        // round before. Two slots a warp are enough: a warp's next but one turn is once round the whole chain.
        float start[2] = {0.f, 0.f};
        if (warp > 0 || round > 0) {
            const int from = warp > 0 ? warp - 1 : warps - 1, made = warp > 0 ? turn : turn - 1;
            receive(start, &handed_on[((made & 1) * warps + from) * 8 + g], made);
            __syncwarp();  // the lane that hands on tells others, by that, that these slots have been read
        }
        if (q == 3) {
            const float behind[2] = {fmaf(decay[0], start[0], end[0]), fmaf(decay[1], start[1], end[1])};
            hand_on(&handed_on[((turn & 1) * warps + warp) * 8 + g], behind, turn);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) start[c] = fmaf(into_decay[c], start[c], into_end[c]);
        // Results of one direction are complete before the next adds to them.
        if (round == 0) __syncthreads();

        if (args.checkpoints && lane_first < steps && lane_first % checkpoint_interval(1) == 0) {
            float* kept =
                args.checkpoints +
                ((image * s.directions + direction) * args.checkpoint_count + lane_first / checkpoint_interval(1)) *
                    s.channels +
                first_channel + 2 * g;
            *reinterpret_cast<float2*>(kept) = make_float2(start[0], start[1]);
        }

        // Several steps together, of which no two may share a position: none waits for the one before.
        const auto add = [&](auto all, auto together) {
            constexpr int kTogether = decltype(together)::value;
#pragma unroll
            for (int begin = 0; begin < kLaneSteps; begin += kTogether) {
                float2* to[kTogether];
                float2 sum[kTogether];
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const int t = begin + i;
                    to[i] = reinterpret_cast<float2*>(merged) + (unsigned_half(offsets[t / 2], t % 2) ^ g);
                    if (decltype(all)::value || signed_half(places[t / 2], t % 2) >= 0) sum[i] = *to[i];
                }
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const int t = begin + i;
                    if (decltype(all)::value || signed_half(places[t / 2], t % 2) >= 0)
                        *to[i] = make_float2(fmaf(z[t][0], start[0], sum[i].x + y[t][0]),
                                             fmaf(z[t][1], start[1], sum[i].y + y[t][1]));
                }
            }
        };
        constexpr std::integral_constant<int, 1> one{};
        constexpr std::integral_constant<int, Small ? 8 : Blocks <= 2 ? 2 : 1> several{};
        if (!(flags & kRevisits)) {
            if (whole) {
                add(std::true_type{}, several);
            } else {
                add(std::false_type{}, several);
            }
        } else {
            // Steps may share a position: one lane of each channel pair at a time, in the order of the steps.
            for (int w = 0; w < warps; ++w) {
                for (int turn_of = 0; turn_of < 4; ++turn_of) {
                    if (w == warp && q == turn_of) add(std::false_type{}, one);
                    __syncwarp();
                }
                __syncthreads();
            }
        }
#pragma unroll
        for (int i = 0; i < kLaneSteps / 2; ++i) places[i] = next_places[i], columns[i] = next_columns[i];
    }
    __syncthreads();

    // Out: 16 bytes a thread, neighbours side by side, so that no sector is written twice.
    constexpr int kPieces = kFusedChannels * sizeof(Out) / 16;
    Out* out = static_cast<Out*>(args.out) + image * s.length * s.channels + first_channel;
#pragma unroll 4
    for (int i = threadIdx.x; i < length * kPieces; i += blockDim.x) {
        const int p = i / kPieces, piece = i % kPieces;
        uint4* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(p) * s.channels) + piece;
        if constexpr (std::is_same_v<Out, float>) {
            *to = *reinterpret_cast<const uint4*>(merged + (merged_offset(p, Small) ^ 16 * piece));
        } else {
            const float4* from = reinterpret_cast<const float4*>(merged + (merged_offset(p, Small) ^ 32 * piece));
            const float4 a = from[0], b = from[1];
            *to = make_uint4(pack<Out>(a.x, a.y), pack<Out>(a.z, a.w), pack<Out>(b.x, b.y), pack<Out>(b.z, b.w));
        }
    }
}

template <typename T, int Blocks, bool Small, typename Out>
void launch_fused(const FusedArgs& args, cudaStream_t stream) {
    const Scan& s = args.scan;
    const int warps = fused_warps(s);
    const int64_t operands = s.directions * (s.channels / kFusedChannels) * Blocks * 32;
    launch(prepare_weights_kernel<T, Blocks, Small>, ceil_div(operands, 128), 128, 0, stream, args);
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

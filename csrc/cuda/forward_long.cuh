// The forward of sixteen states for few rows of many steps: four lanes walk a channel, with four of its states each,
// over all steps in one pass. There are too few warps then to wait for each other, so none waits for memory either: a
// page's rows and inputs are copied to shared memory while the page before is walked.
//
// Of each page a warp first makes the steps of its eight channels, and what B is multiplied with, where a tensor-core
// product leaves them: nothing is computed twice by the lanes of a channel.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {

constexpr int kLongStates = kWideGroup / kLongLanes;                       // of a lane
constexpr int kLongWarps = kLongTile / 8, kLongThreads = kLongWarps * 32;  // eight channels a warp
constexpr int kLongSpan = 8;                                               // steps whose results are summed up together

// Words of a staged row: pairs of B, of C and of low-rank steps, which zeros make up whole operands of a product. Four
// more than a multiple of eight, for the banks; so for inputs, in pairs.
constexpr int kLongGains = kWideGroup / 2;
constexpr int kRowWords = 2 * kLongGains + kLongMostRank / 2 + 4;
constexpr int kInputWords = kLongTile / 2 + 4;

// Words of shared memory: of two pages the positions, rows and inputs; of one (step, gain) for each warp's channels.
constexpr int kRowsAt = 2 * 2 * kPageSteps;
constexpr int kInputsAt = kRowsAt + 2 * kPageSteps * kRowWords;
constexpr int kStepsAt = kInputsAt + 2 * kPageSteps * kInputWords;
constexpr int kLongWords = kStepsAt + kPageSteps * kLongTile * 2;

// Copies 4, 8 or 16 bytes to shared memory, or zeros.
template <int Bytes>
__device__ __forceinline__ void copy(void* to, const void* from, bool there) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes),
                 "r"(there ? Bytes : 0));
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One block's pages, copied ahead.
template <typename T>
struct LongPages {
    uint32_t* positions;  // (2, 2, 64): of inputs and of rows
    uint32_t* rows;       // (2, 64, kRowWords)
    uint32_t* inputs;     // (2, 64, kInputWords)
    const int32_t* table;
    int64_t steps;
    uint32_t length;
    Column<T> source, u;  // of this thread's eight bytes of a row, and sixteen of the inputs
    int row_word;         // where the former go
    bool of_c, copies;

    __device__ LongPages(uint32_t* words, const Scan& s, int64_t image, int direction, int first_channel)
        : positions(words),
          rows(words + kRowsAt),
          inputs(words + kInputsAt),
          steps(s.steps),
          length(static_cast<uint32_t>(s.length)),
          source(s.dt, image, direction, 0),
          u(s.u, image, direction, first_channel + threadIdx.x % 4 * 8) {
        static_assert(kLongGains == 8 && kLongThreads == 2 * kPageSteps);
        const Walk walk(s, image, direction);
        table = threadIdx.x < kPageSteps ? walk.route : walk.param_route;
        const int column = threadIdx.x % 16, rank = static_cast<int>(s.rank);
        const int word = column % 4 * 2, low_word = 2 * (column - 8);
        of_c = column >= 4 && column < 8;
        copies = column < 8 || low_word < rank / 2;
        row_word = 2 * column;
        if (column < 4) source = Column<T>(s.B, image, direction, 2 * word);
        if (of_c) source = Column<T>(s.C, image, direction, 2 * word);
        if (column >= 8) source = Column<T>(s.dt, image, direction, copies ? 2 * low_word : 0);
        // Zeros behind the low-rank steps, which are never copied over.
        for (int t = threadIdx.x; t < 2 * kPageSteps; t += kLongThreads)
            for (int w = 2 * kLongGains + rank / 2; w < kRowWords; ++w) rows[t * kRowWords + w] = 0;
    }

    // Behind the last step zeros, whose rows and inputs change nothing that is read later.
    __device__ __forceinline__ void copy_positions(int64_t page) const {
        const int64_t step = page * kPageSteps + threadIdx.x % kPageSteps;
        copy<4>(positions + page % 2 * 2 * kPageSteps + threadIdx.x, table + min(step, steps - 1), step < steps);
    }
    __device__ __forceinline__ int position_of(int64_t page, int step, bool of_row) const {
        const int position = reinterpret_cast<const int*>(positions)[(page % 2 * 2 + of_row) * kPageSteps + step];
        return static_cast<uint32_t>(position) < length ? position : -1;
    }
    __device__ __forceinline__ void copy_page(int64_t page) const {
        uint32_t* row_to = rows + page % 2 * kPageSteps * kRowWords + row_word;
#pragma unroll
        for (int i = 0; i < kPageSteps * 16 / kLongThreads; ++i) {
            const int t = threadIdx.x / 16 + i * kLongThreads / 16;
            const int row = position_of(page, t, true);
            // What is not written is zero.
            const bool there = row >= 0 && !(of_c && position_of(page, t, false) < 0);
            if (copies) copy<8>(row_to + t * kRowWords, offset_by(source.data, max(row, 0), source.stride), there);
        }
        uint32_t* input_to = inputs + page % 2 * kPageSteps * kInputWords + threadIdx.x % 4 * 4;
#pragma unroll
        for (int i = 0; i < kPageSteps * 4 / kLongThreads; ++i) {
            const int t = threadIdx.x / 4 + i * kLongThreads / 4, at = position_of(page, t, false);
            copy<16>(input_to + t * kInputWords, offset_by(u.data, max(at, 0), u.stride), at >= 0);
        }
    }
};

// What a lane reads of half a span, well before it walks it.
struct LongSteps {
    static constexpr int kSteps = kLongSpan / 2;
    float2 step[kSteps];  // and gain
    uint2 B[kSteps], C[kSteps];

    __device__ __forceinline__ void read(const float* steps, const uint32_t* rows, int t) {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            step[j] = *reinterpret_cast<const float2*>(steps + (t + j) * 16);
            B[j] = *reinterpret_cast<const uint2*>(rows + (t + j) * kRowWords);
            C[j] = *reinterpret_cast<const uint2*>(rows + (t + j) * kRowWords + kLongGains);
        }
    }
    template <typename T>
    __device__ __forceinline__ void walk(float (&h)[kLongStates], float* y, const float (&A)[kLongStates]) const {
        static_assert(kLongStates == 4);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const float2 b0 = unpack<T>(B[j].x), b1 = unpack<T>(B[j].y), c0 = unpack<T>(C[j].x), c1 = unpack<T>(C[j].y);
            const float b[4] = {b0.x, b0.y, b1.x, b1.y}, c[4] = {c0.x, c0.y, c1.x, c1.y};
            y[j] = 0.f;
#pragma unroll
            for (int n = 0; n < kLongStates; ++n) {
                h[n] = fmaf(exp2_fast(step[j].x * A[n]), h[n], step[j].y * b[n]);
                y[j] = n ? fmaf(c[n], h[n], y[j]) : c[n] * h[n];
            }
        }
    }
};

// The sums over a channel's four lanes of eight steps' parts; lane `part` ends with those of steps first(part) and the
// next one.
__device__ __forceinline__ int first_sum_of(int part) { return part / 2 * 4 + part % 2 * 2; }
__device__ __forceinline__ float2 sums_of_lanes(const float (&y)[kLongSpan], int part) {
    const bool high = part & 2, odd = part & 1;
    float half[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        half[j] = (high ? y[4 + j] : y[j]) + __shfl_xor_sync(kFullWarp, high ? y[j] : y[4 + j], 2);
    float sum[2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
        sum[j] = (odd ? half[2 + j] : half[j]) + __shfl_xor_sync(kFullWarp, odd ? half[j] : half[2 + j], 1);
    return make_float2(sum[0], sum[1]);
}

// Results of a span, written while the next one is walked: no lane waits for the others' parts.
template <typename T, typename Out>
struct LongResults {
    float y[kLongSpan] = {};
    float of_input[2] = {};
    uint32_t step = 0u - kLongSpan;  // the first one's

    __device__ __forceinline__ void write(int part, char* out, uint32_t stride, int64_t steps) const {
        const float2 sums = sums_of_lanes(y, part);
        const uint32_t at = step + first_sum_of(part);
        if (at < steps) store_global(out, from_float<Out>(sums.x + of_input[0]));
        if (at + 1 < steps) store_global(offset_by(out, 1, stride), from_float<Out>(sums.y + of_input[1]));
    }
    __device__ __forceinline__ void take(const float (&of_span)[kLongSpan], const uint32_t* inputs, bool odd,
                                         float skip) {
#pragma unroll
        for (int j = 0; j < kLongSpan; ++j) y[j] = of_span[j];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float2 pair = unpack<T>(inputs[j * kInputWords]);
            of_input[j] = skip * (odd ? pair.y : pair.x);
        }
        step += kLongSpan;
    }
};

template <typename T, typename Out>
__global__ void __launch_bounds__(kLongThreads, 4) long_forward_kernel(const __grid_constant__ ForwardArgs args) {
    const Scan& s = args.scan;
    const Place place = place_of_block(args.cut.tiles, 1, static_cast<int>(s.directions));
    const int direction = place.slice, rank = static_cast<int>(s.rank);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int first_channel = place.tile * kLongTile, warp_channel = first_channel + warp * 8;
    const int64_t channel = warp_channel + g, row = place.image * s.directions + direction;

    extern __shared__ __align__(16) uint32_t words[];
    const LongPages<T> pages(words, s, place.image, direction, first_channel);
    float* const steps = reinterpret_cast<float*>(words + kStepsAt) + warp * kPageSteps * 16;

    // As operands: the weights of column g, in a high and a low part.
    uint32_t high[2], low[2];
    const float* weights = s.dt_weight.data + direction * s.dt_weight.direction_stride + channel * rank;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int r = i * 8 + 2 * q;
        const float first = r < rank ? weights[r] : 0.f, second = r + 1 < rank ? weights[r + 1] : 0.f;
        high[i] = pack<T>(first, second);
        const float2 rounded = unpack<T>(high[i]);
        low[i] = pack<T>(first - rounded.x, second - rounded.y);
    }
    const Stepper<false> even(s.dt_bias, direction, warp_channel + 2 * q, s.dt_softplus),
        odd(s.dt_bias, direction, warp_channel + 2 * q + 1, s.dt_softplus);
    const float skip = s.D.data ? s.D.data[direction * s.D.direction_stride + channel] : 0.f;
    float A[kLongStates], h[kLongStates] = {};
#pragma unroll
    for (int n = 0; n < kLongStates; ++n)
        A[n] = s.A.data[direction * s.A.direction_stride + channel * kWideGroup + q * kLongStates + n];

    const uint32_t out_stride = static_cast<uint32_t>(s.channels * sizeof(Out));
    char* out = reinterpret_cast<char*>(static_cast<Out*>(args.out) + row * s.steps * s.channels + channel) +
                (first_sum_of(q) - kLongSpan) * static_cast<int64_t>(out_stride);
    LongResults<T, Out> results;
    float* kept =
        args.checkpoints
            ? args.checkpoints + (row * args.checkpoint_count * s.channels + channel) * kWideGroup + q * kLongStates
            : nullptr;

    const int64_t page_count = (s.steps + kPageSteps - 1) / kPageSteps;
    pages.copy_positions(0);
    end_copies();
    wait_for_copies();
    __syncthreads();
    pages.copy_page(0);
    if (page_count > 1) pages.copy_positions(1);
    end_copies();
    for (int64_t page = 0; page < page_count; ++page) {
        wait_for_copies();
        __syncthreads();
        if (page + 1 < page_count) {
            pages.copy_page(page + 1);
            if (page + 2 < page_count) pages.copy_positions(page + 2);
            end_copies();
        }
        const uint32_t* rows = pages.rows + page % 2 * kPageSteps * kRowWords;
        const uint32_t* inputs = pages.inputs + page % 2 * kPageSteps * kInputWords + warp * 4;

#pragma unroll
        for (int i = 0; i < kPageSteps / 16; ++i) {
            const int t = g + i * 16;
            float raw[4] = {};
            const uint32_t* from = rows + t * kRowWords + 2 * kLongGains + q;
            const uint32_t a[4] = {from[0], from[8 * kRowWords], from[4], from[8 * kRowWords + 4]};
            mma_16bit<T>(raw, a, high[0], high[1]);
            mma_16bit<T>(raw, a, low[0], low[1]);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const float2 u = unpack<T>(inputs[(t + side * 8) * kInputWords + q]);
                const float first = even.step(raw[2 * side]), second = odd.step(raw[2 * side + 1]);
                *reinterpret_cast<float4*>(steps + (t + side * 8) * 16 + 4 * q) =
                    make_float4(first, first * kLn2 * u.x, second, second * kLn2 * u.y);
            }
        }
        __syncwarp();

        if (kept) {
            *reinterpret_cast<float4*>(kept) = make_float4(h[0], h[1], h[2], h[3]);
            kept += s.channels * kWideGroup;
        }
        const int count = static_cast<int>(min(static_cast<int64_t>(kPageSteps), s.steps - page * kPageSteps));
        const float* own_steps = steps + 2 * g;
        const uint32_t* own_rows = rows + 2 * q;
        LongSteps now, next;
        now.read(own_steps, own_rows, 0);
#pragma unroll 2
        for (int t = 0; t < count; t += kLongSpan) {
            float y[kLongSpan];
            next.read(own_steps, own_rows, t + LongSteps::kSteps);
            now.template walk<T>(h, y, A);
            now.read(own_steps, own_rows, min(t + kLongSpan, kPageSteps - LongSteps::kSteps));
            next.template walk<T>(h, y + LongSteps::kSteps, A);
            results.write(q, out, out_stride, s.steps);
            results.take(y, inputs + (t + first_sum_of(q)) * kInputWords + g / 2, g % 2, skip);
            out += static_cast<uint64_t>(kLongSpan) * out_stride;
        }
    }
    results.write(q, out, out_stride, s.steps);
}

// One compilation unit per input dtype instantiates this.
template <typename T>
void long_forward(const ForwardArgs& args, bool float_out, cudaStream_t stream) {
    const Scan& s = args.scan;
    const int64_t blocks = s.batch * s.directions * args.cut.tiles;
    const auto run = [&](auto kernel) { launch(kernel, blocks, kLongThreads, kLongWords * 4, stream, args); };
    run(float_out ? long_forward_kernel<T, float> : long_forward_kernel<T, T>);
}

}  // namespace vmamba::cuda

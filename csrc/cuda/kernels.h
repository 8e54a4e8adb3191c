// What the host code and the kernels' compilation units say to each other: argument blocks and one entry point per
// unit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../scan.h"
#include "plan.h"

namespace vmamba::cuda {

enum class Pass { summary, output };

// A failed CUDA call or launch becomes an exception (scan_cuda.cu, which knows how torch words it).
void check(cudaError_t status);

inline int device_attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
}

// The stream torch queues its work on, on this device.
cudaStream_t current_stream(int device);

struct ForwardArgs {
    Scan scan;
    Cut cut;
    int64_t checkpoint_count = 0;  // checkpoints of one (image, direction)
    void* out = nullptr;           // (batch, slice, T, D); the states themselves for Result::states
    float* checkpoints = nullptr;  // or null
    const float* carry = nullptr;  // state before every chunk (batch, slice, chunk, D, group), or null for zero
    float* carry_out = nullptr;    // summary: end state of every chunk from zero
    float* decay = nullptr;        // summary: how much of a state survives every chunk
};

// What the fused forward reads beside its tensors, prepared once per call. Tables are padded to whole rounds of tiles.
struct Prepared {
    int16_t* places = nullptr;    // (K, padded): position, kNowhere for a step that only decays, kBehind for padding
    uint16_t* offsets = nullptr;  // (K, padded): offset of the position in the merged result, in channel pairs
    int32_t* flags = nullptr;     // (K): kRevisits, kSomeNowhere
    uint4* weights = nullptr;     // (K, D / 16, blocks, high or low, lane): a-operands of dt_weight
    int64_t padded = 0;
};
constexpr int kNowhere = -1, kBehind = -2;
constexpr int kRevisits = 1, kSomeNowhere = 2;
void prepare_route(const Scan& scan, const Prepared& prepared, cudaStream_t stream);

struct FusedArgs {
    Scan scan;
    void* out = nullptr;
    float* checkpoints = nullptr;
    int64_t checkpoint_count = 0;
    Prepared prepared;
};

struct BackwardArgs {
    Scan scan;
    Cut cut;
    int64_t checkpoint_count = 0;
    const void* grad = nullptr;
    Scalar grad_dtype = Scalar::f32;
    const float* checkpoints = nullptr;
    bool rows_in_pairs = false;    // of 16-bit numbers (plan.h)
    const float* carry = nullptr;  // gradient that arrives behind every chunk, or null for zero
    float* carry_out = nullptr;    // summary
    float* decay = nullptr;        // summary
    int64_t du_steps = 0;          // T, rounded up to whole spans if there is one state
    void* du = nullptr;            // (batch, slice, du_steps, D) in Scan::dtype, float where there are several groups
    void* ddt = nullptr;           // (batch, slice, T, D) of a full dt, likewise
    float* rows = nullptr;         // (batch, slice, tile, T, R + 2 * group): gradients of low-rank steps, B and C
    float* params = nullptr;       // (batch, chunk, slice, group + 2 + R, D): A, D, bias, weight
};

template <typename T>
void forward_pass(const ForwardArgs& args, Pass pass, bool float_out, cudaStream_t stream);
template <typename T>
void long_forward(const ForwardArgs& args, bool float_out, cudaStream_t stream);
template <typename T>
void fused_forward(const FusedArgs& args, bool float_out, cudaStream_t stream);
template <typename T>
void backward_pass(const BackwardArgs& args, Pass pass, cudaStream_t stream);
template <typename T>
void backward_wide_pass(const BackwardArgs& args, Pass pass, cudaStream_t stream);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    if (blocks == 0) return;
    if (shared_bytes > 48 * 1024)
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError());
}

// Lists of visits per position, for each direction of each table (gather.cu). last: (tables, L), the last step that
// visits a position or -1; previous: (tables, T), the visit before a step's, so that a walk from last goes back in
// time.
struct Visits {
    int32_t* last = nullptr;
    int32_t* previous = nullptr;
    bool per_image = false;
};
void list_visits(const Scan& scan, const Table<int32_t>& table, const Visits& visits, cudaStream_t stream);

// target[image, o, position] = the sum over directions, visits and groups of source[image, slice, step].
struct GatherArgs {
    Visits visits;
    const void* source = nullptr;  // (batch, K * groups, source_steps, features)
    Scalar source_dtype = Scalar::f32;
    void* target = nullptr;
    Scalar target_dtype = Scalar::f32;
    int64_t image_stride = 0, output_stride = 0, position_stride = 0;  // of target
    int64_t batch = 0, length = 0, steps = 0, source_steps = 0, features = 0;
    Divisor packs;  // of features; set by gather
    int directions = 0, groups = 1;
    int outputs = 1;  // 1: all directions add up; K: each has its own
};
void gather(const GatherArgs& args, cudaStream_t stream);

// target[image, k, t] = the sum over groups of source[image, k * groups + g, t].
void sum_groups(const float* source, int64_t rows, int groups, int64_t size, void* target, Scalar target_dtype,
                cudaStream_t stream);

// Sums of the columns of partial, (blocks, columns), always added in the same order (column_sums.cu). The first
// of_first go to `first`, the others to `second`.
void sum_partials(const float* partial, int blocks, int columns, float* first, int of_first, float* second,
                  cudaStream_t stream);

// Gradients of low-rank steps, B and C: sums of BackwardArgs::rows over tiles, groups, visits and, if shared,
// directions.
void gather_rows(const BackwardArgs& args, const Visits& visits, const Gradients& gradients, cudaStream_t stream);

// Gradients of A, D, dt_bias and dt_weight: sums of BackwardArgs::params over images and chunks.
void reduce_params(const BackwardArgs& args, const Gradients& gradients, cudaStream_t stream);

// Turns chunk summaries into the value that enters each chunk, in place: forwards, or backwards for gradients.
void fold(float* carry, const float* decay, int64_t rows, int64_t chunks, int64_t size, bool backwards,
          cudaStream_t stream);

}  // namespace vmamba::cuda

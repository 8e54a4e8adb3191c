// What a selective scan is told, in plain pointers, sizes and strides: no torch in here, so that every kernel (CPU,
// CUDA) reads the same description.
#pragma once

#include <cstdint>

namespace vmamba {

enum class Scalar { f32, bf16, f16 };

// merged: (batch, L, D), summed over directions and visits. steps: (batch, K, T, D). states: (batch, K, T, D, N).
enum class Result { merged, steps, states };

// An activation: rows of contiguous features, one row per (image, direction, position). Strides count elements; the
// direction stride is 0 where all directions share the rows.
struct Rows {
    const void* data = nullptr;
    int64_t image_stride = 0;
    int64_t direction_stride = 0;
    int64_t position_stride = 0;
};

// A float32 parameter: one contiguous block per direction; the stride is 0 where all directions share it.
struct Param {
    const float* data = nullptr;
    int64_t direction_stride = 0;
};

// An integer table of T entries per (image, direction), contiguous along T; image_stride is 0 for one shared by images.
template <typename T>
struct Table {
    const T* data = nullptr;
    int64_t image_stride = 0;
    int64_t direction_stride = 0;

    const T* at(int64_t image, int64_t direction) const {
        return data ? data + image * image_stride + direction * direction_stride : nullptr;
    }
};

struct Scan {
    int64_t batch = 0;
    int64_t length = 0;          // L, positions of the map
    int64_t directions = 0;      // K
    int64_t steps = 0;           // T
    int64_t channels = 0;        // D
    int64_t states = 0;          // N
    int64_t rank = 0;            // R of a low-rank dt; 0 for a full one
    Scalar dtype = Scalar::f32;  // of u, dt, B and C
    Result result = Result::merged;
    bool dt_softplus = true;

    Rows u, dt, B, C;  // D, R or D, N and N features a row; C.data may be null for Result::states
    Param A;           // (D, N) a direction
    Param D;           // (D), may be null
    Param dt_weight;   // (D, R), null for a full dt
    Param dt_bias;     // (D), may be null

    Table<int32_t> route;        // where u is read and the result written; negative: u = 0, nothing written
    Table<int32_t> param_route;  // where dt, B and C are read; negative: they are 0
    Table<uint8_t> reset;        // nonzero: the state is zeroed before this step; may be null

    // The state before every checkpoint_steps-th step, (batch, K, ceil(T / checkpoint_steps), D, N), kept by the
    // forward for the backward. 0: none is kept.
    int64_t checkpoint_steps = 0;
};

// Where the backward writes: contiguous, in the shapes of the inputs, but for what row_stride says. Null for an absent
// input.
struct Gradients {
    void* u = nullptr;  // in Scan::dtype, like dt, B and C
    void* dt = nullptr;
    void* B = nullptr;
    void* C = nullptr;
    int64_t row_stride = 0;  // where low-rank dt, B and C are parts of longer rows: how long those are. CUDA only.
    float* A = nullptr;
    float* D = nullptr;
    float* dt_weight = nullptr;
    float* dt_bias = nullptr;
};

}  // namespace vmamba

// The MLP of a narrow residual block, fc2(gelu(fc1(x))), whose hidden map stays in registers; queued on the current
// stream, deterministic.
#pragma once

#include <cstdint>

#include "../scan.h"

namespace vmamba::cuda {

constexpr int kMlpChunk = 32;  // hidden units that are computed and used at a time
constexpr int kMlpMostHidden = 1024;

inline bool serves_mlp(int64_t channels, int64_t hidden) {
    return (channels == 64 || channels == 96 || channels == 128) && hidden > 0 && hidden <= kMlpMostHidden &&
           hidden % kMlpChunk == 0;
}
inline bool serves_mlp_backward(int64_t channels, int64_t hidden) {
    return serves_mlp(channels, hidden) && channels <= 96;
}

struct Mlp {
    const void* x = nullptr;        // (rows, channels)
    const void* weight1 = nullptr;  // (hidden, channels)
    const float* bias1 = nullptr;   // (hidden)
    int64_t rows = 0;
    int channels = 0;
    int hidden = 0;
    Scalar dtype = Scalar::bf16;  // of all but the biases: a 16-bit one
};

struct MlpForward : Mlp {
    const void* weight2 = nullptr;  // (channels, hidden)
    const float* bias2 = nullptr;   // (channels)
    void* y = nullptr;              // (rows, channels)
};

// A residual branch: total + mlp(layer_norm(total)), where total is x, x + branch, or
// x + linear(layer_norm(branch), projection).
struct MlpResidual : MlpForward {
    struct Norm {
        const float* weight = nullptr;  // (channels)
        const float* bias = nullptr;
        float eps = 0.0f;
    };
    const void* branch = nullptr;      // (rows, channels), or null
    const void* projection = nullptr;  // (channels, channels), or null
    Norm branch_norm;                  // before the projection
    Norm norm;
    Scalar x_dtype = Scalar::f32;  // of x and y: float32 or dtype
};

struct MlpBackward : Mlp {
    const void* grad = nullptr;       // (rows, channels)
    const void* weight1_t = nullptr;  // (channels, hidden)
    const void* weight2_t = nullptr;  // (hidden, channels)
    void* dx = nullptr;               // (rows, channels)
    void* activation = nullptr;       // (rows, hidden), gelu(fc1(x))
    void* dhidden = nullptr;          // (rows, hidden), the gradient of fc1(x)
    float* dbias1 = nullptr;          // (hidden)
};

void mlp_forward(const MlpForward& mlp, int device);
void mlp_residual(const MlpResidual& mlp, int device);
int64_t mlp_backward_workspace(const MlpBackward& mlp, int device);
void mlp_backward(const MlpBackward& mlp, void* workspace, int device);

}  // namespace vmamba::cuda

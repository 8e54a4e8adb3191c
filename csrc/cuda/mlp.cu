#include <torch/csrc/stable/accelerator.h>

#include "mlp_units.h"

namespace vmamba::cuda {

void mlp_forward(const MlpForward& mlp, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto run = mlp.dtype == Scalar::bf16 ? mlp_forward_as<__nv_bfloat16> : mlp_forward_as<__half>;
    run(mlp, device, current_stream(device));
}

void mlp_residual(const MlpResidual& mlp, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto run = mlp.dtype == Scalar::bf16 ? mlp_residual_as<__nv_bfloat16> : mlp_residual_as<__half>;
    run(mlp, device, current_stream(device));
}

int64_t mlp_backward_workspace(const MlpBackward& mlp, int device) {
    const int blocks = blocks_for(mlp.rows, 16 * kMlpBackwardWarps, device);
    return blocks * kMlpBackwardWarps * mlp.hidden * int64_t(sizeof(float));
}

void mlp_backward(const MlpBackward& mlp, void* workspace, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto run = mlp.dtype == Scalar::bf16 ? mlp_backward_as<__nv_bfloat16> : mlp_backward_as<__half>;
    run(mlp, static_cast<float*>(workspace), device, current_stream(device));
}

}  // namespace vmamba::cuda

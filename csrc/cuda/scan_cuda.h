// The CUDA kernels, with the four entry points every device offers. All work is queued on the current stream: no host
// synchronisation, no allocation, so that calls can be captured in CUDA graphs.
#pragma once

#include "../scan.h"

namespace vmamba::cuda {

int64_t forward_workspace(const Scan& scan);
void forward(const Scan& scan, void* out, Scalar out_dtype, float* checkpoints, void* workspace, int device);

int64_t backward_workspace(const Scan& scan);
void backward(const Scan& scan, const void* grad, Scalar grad_dtype, const float* checkpoints,
              const Gradients& gradients, void* workspace, int device);

}  // namespace vmamba::cuda

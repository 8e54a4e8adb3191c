// The CUDA kernels, with the four entry points every device offers. All work is queued on the current stream: no host
// synchronisation, no allocation, so that calls can be captured in CUDA graphs.
#pragma once

#include "../scan.h"

namespace vmamba::cuda {

int64_t forward_workspace(const Scan& scan, int device);
void forward(const Scan& scan, void* out, Scalar out_dtype, float* checkpoints, void* workspace, int device);

int64_t backward_workspace(const Scan& scan, int device);
void backward(const Scan& scan, const void* grad, Scalar grad_dtype, const float* checkpoints,
              const Gradients& gradients, void* workspace, int device);

// Throws what an earlier kernel left behind, if it failed: every call fails from then on, whatever it asks for.
void check_for_earlier_failure();

}  // namespace vmamba::cuda

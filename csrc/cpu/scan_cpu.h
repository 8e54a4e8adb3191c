// The CPU kernels: threads over images and blocks of channels, vector lanes over channels, steps in sequence.
#pragma once

#include <string>

#include "../scan.h"

namespace vmamba::cpu {

// Name of the instruction set in use: avx512, avx2 or baseline.
std::string isa();

int64_t forward_workspace(const Scan& scan, int device);
void forward(const Scan& scan, void* out, Scalar out_dtype, float* checkpoints, void* workspace, int device);

int64_t backward_workspace(const Scan& scan, int device);
void backward(const Scan& scan, const void* grad, Scalar grad_dtype, const float* checkpoints,
              const Gradients& gradients, void* workspace, int device);

}  // namespace vmamba::cpu

// GELU behind a linear layer, and its backward, with the gradient of that layer's bias; queued on the current stream,
// deterministic.
#pragma once

#include <cstdint>

#include "../scan.h"

namespace vmamba::cuda {

constexpr int kGeluPack = 8;  // numbers a thread has
inline bool serves_gelu(int64_t columns) {
    return columns > 0 && columns % kGeluPack == 0 && columns < (int64_t{1} << 31);
}

// count: a multiple of kGeluPack.
void gelu_forward(const void* x, void* y, int64_t count, Scalar dtype, int device);

struct GeluBackward {
    const void* grad = nullptr;  // (rows, columns), contiguous, as x and dx
    const void* x = nullptr;
    void* dx = nullptr;
    float* dbias = nullptr;  // (columns), sums of dx over the rows
    int64_t rows = 0;
    int64_t columns = 0;
    Scalar dtype = Scalar::f32;  // of grad, x and dx
};

int64_t gelu_backward_workspace(const GeluBackward& gelu, int device);
void gelu_backward(const GeluBackward& gelu, void* workspace, int device);

}  // namespace vmamba::cuda

#include "kernels.h"

namespace vmamba::cuda {
namespace {

constexpr int kWidth = 32, kParts = 32;

// 32 columns a block, in 32 interleaved parts that are added in order.
__global__ void sum_partials_kernel(const float* partial, int blocks, int columns, float* first, int of_first,
                                    float* second) {
    __shared__ float parts[kParts][kWidth];
    const int column = blockIdx.x * kWidth + threadIdx.x;
    float total = 0.0f;
    if (column < columns)
#pragma unroll 8
        for (int block = threadIdx.y; block < blocks; block += kParts)
            total += partial[int64_t(block) * columns + column];
    parts[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        for (int part = 1; part < kParts; ++part) total += parts[part][threadIdx.x];
        (column < of_first ? first[column] : second[column - of_first]) = total;
    }
}

}  // namespace

void sum_partials(const float* partial, int blocks, int columns, float* first, int of_first, float* second,
                  cudaStream_t stream) {
    sum_partials_kernel<<<static_cast<unsigned>(ceil_div(columns, kWidth)), dim3(kWidth, kParts), 0, stream>>>(
        partial, blocks, columns, first, of_first, second);
    check(cudaGetLastError());
}

}  // namespace vmamba::cuda

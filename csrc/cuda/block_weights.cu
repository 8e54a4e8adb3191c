#include <torch/csrc/stable/accelerator.h>

#include "block_weights.h"
#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {
namespace {

constexpr int kThreads = 256, kPack = 4, kBlocks = 132;  // of each item

template <typename T>
__device__ __forceinline__ void convert(const BlockWeights::Item& item, int64_t i, float x) {
    if (item.decay) {
        static_cast<float*>(item.to)[i] = -expf(x);
    } else {
        static_cast<T*>(item.to)[i] = from_float<T>(x);
    }
}

template <typename T>
__global__ void prepare_kernel(const __grid_constant__ BlockWeights weights) {
    const BlockWeights::Item& item = weights.items[blockIdx.y];
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
    const bool aligned =
        reinterpret_cast<uintptr_t>(item.from) % sizeof(float4) == 0;  // parts of flat tensors may not be
    const int64_t packs = aligned ? item.count / kPack : 0;
#pragma unroll 4
    for (int64_t i = first; i < packs; i += step) {
        const float4 x = reinterpret_cast<const float4*>(item.from)[i];
        if (item.decay) {
            reinterpret_cast<float4*>(item.to)[i] = {-expf(x.x), -expf(x.y), -expf(x.z), -expf(x.w)};
        } else {
            reinterpret_cast<uint2*>(item.to)[i] = {pack<T>(x.x, x.y), pack<T>(x.z, x.w)};
        }
    }
    for (int64_t i = packs * kPack + first; i < item.count; i += step) convert<T>(item, i, item.from[i]);
}

}  // namespace

void prepare_block_weights(const BlockWeights& weights, int device) {
    if (weights.size == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dim3 grid(kBlocks, weights.size);
    const cudaStream_t stream = current_stream(device);
    if (weights.dtype == Scalar::bf16) {
        prepare_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(weights);
    } else {
        prepare_kernel<__half><<<grid, kThreads, 0, stream>>>(weights);
    }
    check(cudaGetLastError());
}

}  // namespace vmamba::cuda

// A warp takes turns through tiles of 16 rows, which it normalises in registers; all weights are in shared memory.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "kernels.h"
#include "mlp_tiles.cuh"
#include "norm_linear.h"

namespace vmamba::cuda {
namespace {

using namespace mlp;

constexpr int kWarps = 8, kResidentBlocks = 2;

template <typename X, typename T, int Channels>
__global__ void __launch_bounds__(32 * kWarps, kResidentBlocks)
    norm_linear_kernel(const __grid_constant__ NormLinear layer) {
    constexpr int kBlocks = Channels / 32;
    using Weights = ByUnit<Channels>;
    extern __shared__ uint4 weights[];
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int count = layer.out_channels / 32;
    auto* norm_weight = reinterpret_cast<float4*>(weights + count * Weights::kPieces);
    float4* norm_bias = norm_weight + Channels / 2;
    for (int i = 0; i < count; ++i)
        Weights::stage(weights + i * Weights::kPieces, static_cast<const T*>(layer.weight), i);
    commit();
    copy_pairs(norm_weight, layer.norm_weight, Channels);
    copy_pairs(norm_bias, layer.norm_bias, Channels);
    wait_for_copies<0>();
    __syncthreads();

    const int64_t step = int64_t(gridDim.x) * kWarps * 16;
    for (int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * 16; first < layer.rows; first += step) {
        Tiles rows[kBlocks];
        read_tiles<X, false>(rows, layer.x, first, layer.rows, g, q);
        Left normed[1][kBlocks];
        norm_rows<T>(normed[0], rows, norm_weight, norm_bias, layer.eps, q);
        for (int i = 0; i < count; ++i) {
            Tiles sum[1];
            sum[0].clear();
            to_hidden<T, Channels>(sum, normed, weights + i * Weights::kPieces, g, q);
            store_rows<T>(layer.y, sum[0].template rounded<T>(), first, layer.rows, layer.out_channels, 32 * i, g, q);
        }
    }
}

template <typename X, typename T, int Channels>
void run(const NormLinear& layer, int device) {
    const int64_t most = int64_t{device_attribute(cudaDevAttrMultiProcessorCount, device)} * kResidentBlocks;
    const int64_t bytes = int64_t{layer.out_channels} * Channels * sizeof(T) + Channels * sizeof(float4);
    launch(norm_linear_kernel<X, T, Channels>, std::min(ceil_div(layer.rows, 16 * kWarps), most), 32 * kWarps, bytes,
           current_stream(device), layer);
}

template <typename X, typename T>
void run_as(const NormLinear& layer, int device) {
    const auto run_it = layer.channels == 64 ? run<X, T, 64> : layer.channels == 96 ? run<X, T, 96> : run<X, T, 128>;
    run_it(layer, device);
}

}  // namespace

void norm_linear(const NormLinear& layer, int device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const bool wide = layer.x_dtype == Scalar::f32;
    if (layer.dtype == Scalar::bf16) {
        (wide ? run_as<float, __nv_bfloat16> : run_as<__nv_bfloat16, __nv_bfloat16>)(layer, device);
    } else {
        (wide ? run_as<float, __half> : run_as<__half, __half>)(layer, device);
    }
}

}  // namespace vmamba::cuda

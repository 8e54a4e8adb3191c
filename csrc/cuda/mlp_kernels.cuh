// The kernels of mlp.h. A warp has 16 or 32 rows; for a chunk of 32 hidden units at a time it computes their values,
// applies GELU where the tensor core left them, and multiplies them on, as the next product's left operand.
#pragma once

#include <algorithm>

#include "gelu.cuh"
#include "mlp_tiles.cuh"
#include "mlp_units.h"

namespace vmamba::cuda {
namespace mlp {

// How a kernel is run: Rows sixteens of rows to a warp, Warps to a block, one block to a multiprocessor.
template <int Channels>
struct ForwardShape {
    static constexpr int kRows = Channels <= 96 ? 2 : 1, kWarps = Channels == 96 ? 8 : 12;
    static constexpr int kPieces = ByUnit<Channels>::kPieces + ByChannel<Channels>::kPieces;
};
template <int Channels>
struct BackwardShape {
    static constexpr int kRows = 1, kWarps = kMlpBackwardWarps;
    static constexpr int kPieces = 2 * ByUnit<Channels>::kPieces + ByChannel<Channels>::kPieces;
};

template <typename Shape>
constexpr int kTileRows = 16 * Shape::kRows * Shape::kWarps;

// Tiles of rows that a block has: its own number, then every gridDim.x-th.
__device__ __forceinline__ int tiles_of_block(int64_t tiles) {
    return static_cast<int>((tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);
}

// What is around the two products of a forward pass: `read_ahead` asks for the next rows while the last are being
// written, `begin` makes the operand of the first product and what the second one adds to.

// The MLP and nothing else.
template <typename T, int Channels>
struct Alone {
    using Arguments = MlpForward;
    static constexpr int kRows = ForwardShape<Channels>::kRows, kBlocks = Channels / 32, kNumbers = Channels;
    const Arguments& mlp;
    const float4* bias;
    int g, q;

    __device__ Alone(const Arguments& mlp, float4* numbers, int g, int q) : mlp(mlp), bias(numbers), g(g), q(q) {
        copy_pairs(numbers, mlp.bias2, Channels);
    }
    __device__ __forceinline__ void read_ahead(Left (&x)[kRows][kBlocks], int64_t first) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) load_rows<T, Channels>(x[r], mlp.x, first + 16 * r, mlp.rows, g, q);
    }
    __device__ __forceinline__ void begin(Left (&)[kRows][kBlocks], Tiles (&y)[kRows][kBlocks], int64_t) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) y[r][block].fill(bias + 16 * block, q);
    }
    __device__ __forceinline__ void write(const Tiles (&y)[kRows][kBlocks], int64_t first) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int block = 0; block < kBlocks; ++block)
                store_rows<T>(mlp.y, y[r][block].template rounded<T>(), first + 16 * r, mlp.rows, Channels, 32 * block,
                              g, q);
    }
};

// A residual branch, whose sum stays in the registers that the second product adds to.
template <typename X, typename T, int Channels>
struct Residual {
    using Arguments = MlpResidual;
    static constexpr int kRows = ForwardShape<Channels>::kRows, kBlocks = Channels / 32, kNumbers = 3 * Channels;
    const Arguments& mlp;
    const float4 *bias, *norm_weight, *norm_bias;
    int g, q;

    __device__ Residual(const Arguments& mlp, float4* numbers, int g, int q)
        : mlp(mlp), bias(numbers), norm_weight(numbers + Channels / 2), norm_bias(numbers + Channels), g(g), q(q) {
        copy_pairs(numbers, mlp.bias2, Channels);
        copy_pairs(numbers + Channels / 2, mlp.norm_weight, Channels);
        copy_pairs(numbers + Channels, mlp.norm_bias, Channels);
    }
    __device__ __forceinline__ void read_ahead(Left (&)[kRows][kBlocks], int64_t) const {}  // no registers are free
    __device__ __forceinline__ void begin(Left (&x)[kRows][kBlocks], Tiles (&y)[kRows][kBlocks], int64_t first) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            read_tiles<X, false>(y[r], mlp.x, first + 16 * r, mlp.rows, g, q);
            if (mlp.branch) read_tiles<T, true>(y[r], mlp.branch, first + 16 * r, mlp.rows, g, q);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            norm_rows<T>(x[r], y[r], norm_weight, norm_bias, mlp.eps, q);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) y[r][block].add(bias + 16 * block, q);
        }
    }
    __device__ __forceinline__ void write(const Tiles (&y)[kRows][kBlocks], int64_t first) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) write_tiles<X>(mlp.y, y[r], first + 16 * r, mlp.rows, g, q);
    }
};

template <typename T, int Channels, bool Resident, typename Around>
__global__ void __launch_bounds__(32 * ForwardShape<Channels>::kWarps, 1)
    forward_kernel(const __grid_constant__ typename Around::Arguments mlp) {
    using Shape = ForwardShape<Channels>;
    constexpr int kRows = Shape::kRows, kBlocks = Channels / 32;
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int count = mlp.hidden / kMlpChunk;
    auto* bias1 = reinterpret_cast<float4*>(shared + (Resident ? count : kTurns) * Shape::kPieces);
    copy_pairs(bias1, mlp.bias1, mlp.hidden);
    const Around around(mlp, bias1 + mlp.hidden / 2, g, q);
    const auto stage = [&](uint4* to, int chunk) {
        ByUnit<Channels>::stage(to, static_cast<const T*>(mlp.weight1), chunk);
        ByChannel<Channels>::stage(to + ByUnit<Channels>::kPieces, static_cast<const T*>(mlp.weight2), chunk,
                                   mlp.hidden);
    };
    const int tiles = tiles_of_block(ceil_div(mlp.rows, kTileRows<Shape>));
    Chunks<Resident, Shape::kPieces> chunks{shared, count};
    chunks.begin(tiles, stage);
    if constexpr (!Resident) __syncthreads();  // the biases

    int64_t first = int64_t(blockIdx.x) * kTileRows<Shape> + threadIdx.x / 32 * 16 * kRows;
    Left x[kRows][kBlocks];
    around.read_ahead(x, first);
    for (int tile = 0; tile < tiles; ++tile) {
        Tiles y[kRows][kBlocks];
        around.begin(x, y, first);
        chunks.walk(stage, [&](const uint4* weights, int chunk) {
            Tiles hidden[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) hidden[r].fill(bias1 + chunk * kMlpChunk / 2, q);
            to_hidden<T, Channels>(hidden, x, weights, g, q);
            Left activation[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int i = 0; i < 16; ++i) hidden[r].of[i / 4][i % 4] = gelu_fast<T>(hidden[r].of[i / 4][i % 4]);
                activation[r] = hidden[r].template rounded<T>();
            }
            from_hidden<T, Channels>(y, activation, weights + ByUnit<Channels>::kPieces, g, q);
        });
        const int64_t written = first;
        first += int64_t(gridDim.x) * kTileRows<Shape>;
        around.read_ahead(x, first);
        around.write(y, written);
    }
}

// The sums of 32 columns over 16 rows: lane 4g + q returns column 8q + g. Halves of the values go to the lanes that
// keep them.
__device__ __forceinline__ float sum_rows(const Tiles& tiles, int g) {
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = tiles.of[i / 2][i % 2] + tiles.of[i / 2][2 + i % 2];
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        const bool upper = g & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float sent = upper ? sums[i] : sums[i + half];
            sums[i] = (upper ? sums[i + half] : sums[i]) + __shfl_xor_sync(kFullWarp, sent, 4 * half);
        }
    }
    return sums[0];
}

// partial: (warps, hidden), sums of dhidden over a warp's rows.
template <typename T, int Channels, bool Resident>
__global__ void __launch_bounds__(32 * BackwardShape<Channels>::kWarps, 1)
    backward_kernel(const __grid_constant__ MlpBackward mlp, float* __restrict__ partial) {
    using Shape = BackwardShape<Channels>;
    constexpr int kBlocks = Channels / 32, kUnitPieces = ByUnit<Channels>::kPieces;
    static_assert(Shape::kRows == 1);
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int count = mlp.hidden / kMlpChunk;
    auto* bias1 = reinterpret_cast<float4*>(shared + (Resident ? count : kTurns) * Shape::kPieces);
    copy_pairs(bias1, mlp.bias1, mlp.hidden);
    const auto stage = [&](uint4* to, int chunk) {
        ByUnit<Channels>::stage(to, static_cast<const T*>(mlp.weight1), chunk);
        ByUnit<Channels>::stage(to + kUnitPieces, static_cast<const T*>(mlp.weight2_t), chunk);
        ByChannel<Channels>::stage(to + 2 * kUnitPieces, static_cast<const T*>(mlp.weight1_t), chunk, mlp.hidden);
    };
    const int tiles = tiles_of_block(ceil_div(mlp.rows, kTileRows<Shape>));
    Chunks<Resident, Shape::kPieces> chunks{shared, count};
    chunks.begin(tiles, stage);
    if constexpr (!Resident) __syncthreads();

    float sums[kMlpMostHidden / kMlpChunk];  // of chunks: in local memory, since the loop over them is not unrolled
    for (int chunk = 0; chunk < count; ++chunk) sums[chunk] = 0.f;
    const int warp = threadIdx.x / 32;
    int64_t first = int64_t(blockIdx.x) * kTileRows<Shape> + warp * 16;
    Left x[1][kBlocks], dy[1][kBlocks];
    const auto load = [&](int64_t first) {
        load_rows<T, Channels>(x[0], mlp.x, first, mlp.rows, g, q);
        load_rows<T, Channels>(dy[0], mlp.grad, first, mlp.rows, g, q);
    };
    load(first);
    for (int tile = 0; tile < tiles; ++tile) {
        Tiles dx[1][kBlocks];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) dx[0][block].clear();
        chunks.walk(stage, [&](const uint4* weights, int chunk) {
            Tiles hidden[1], grad[1];
            hidden[0].fill(bias1 + chunk * kMlpChunk / 2, q);
            grad[0].clear();
            to_hidden<T, Channels>(hidden, x, weights, g, q);
            to_hidden<T, Channels>(grad, dy, weights + kUnitPieces, g, q);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const GeluSlope gelu(hidden[0].of[i / 4][i % 4]);
                hidden[0].of[i / 4][i % 4] = gelu.value;
                grad[0].of[i / 4][i % 4] *= gelu.slope;
            }
            sums[chunk] += sum_rows(grad[0], g);
            const Left dhidden[1] = {grad[0].template rounded<T>()};
            const int column = chunk * kMlpChunk;
            store_rows<T>(mlp.activation, hidden[0].template rounded<T>(), first, mlp.rows, mlp.hidden, column, g, q);
            store_rows<T>(mlp.dhidden, dhidden[0].apart(), first, mlp.rows, mlp.hidden, column, g, q);
            from_hidden<T, Channels>(dx, dhidden, weights + 2 * kUnitPieces, g, q);
        });
        const int64_t written = first;
        first += int64_t(gridDim.x) * kTileRows<Shape>;
        load(first);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
            store_rows<T>(mlp.dx, dx[0][block].template rounded<T>(), written, mlp.rows, Channels, 32 * block, g, q);
    }
    float* row = partial + (int64_t(blockIdx.x) * Shape::kWarps + warp) * mlp.hidden;
    for (int chunk = 0; chunk < count; ++chunk) row[chunk * kMlpChunk + 8 * q + g] = sums[chunk];
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------

// Calls run(std::true_type{}, bytes) where all chunks fit into shared memory, with `numbers` of biases, else
// run(std::false_type{}, bytes).
template <typename Shape, typename Run>
void with_residence(int chunks, int numbers, int device, const Run& run) {
    const auto bytes = [&](int kept) { return (kept * Shape::kPieces + numbers / 2) * int(sizeof(uint4)); };
    if (bytes(chunks) <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
        run(std::true_type{}, bytes(chunks));
    } else {
        run(std::false_type{}, bytes(kTurns));
    }
}

template <typename T, int Channels, typename Around>
void forward(const typename Around::Arguments& mlp, int device, cudaStream_t stream) {
    using Shape = ForwardShape<Channels>;
    const int numbers = mlp.hidden + Around::kNumbers;
    with_residence<Shape>(mlp.hidden / kMlpChunk, numbers, device, [&](auto resident, int bytes) {
        launch(forward_kernel<T, Channels, resident.value, Around>, blocks_for(mlp.rows, kTileRows<Shape>, device),
               32 * Shape::kWarps, bytes, stream, mlp);
    });
}

template <typename T, int Channels>
void alone(const MlpForward& mlp, int device, cudaStream_t stream) {
    forward<T, Channels, Alone<T, Channels>>(mlp, device, stream);
}

template <typename T, int Channels>
void residual(const MlpResidual& mlp, int device, cudaStream_t stream) {
    const bool wide = mlp.x_dtype == Scalar::f32;
    (wide ? forward<T, Channels, Residual<float, T, Channels>>
          : forward<T, Channels, Residual<T, T, Channels>>)(mlp, device, stream);
}

template <typename T, int Channels>
void backward(const MlpBackward& mlp, float* partial, int device, cudaStream_t stream) {
    using Shape = BackwardShape<Channels>;
    const int blocks = blocks_for(mlp.rows, kTileRows<Shape>, device);
    with_residence<Shape>(mlp.hidden / kMlpChunk, mlp.hidden, device, [&](auto resident, int bytes) {
        launch(backward_kernel<T, Channels, resident.value>, blocks, 32 * Shape::kWarps, bytes, stream, mlp, partial);
    });
    sum_partials(partial, blocks * Shape::kWarps, mlp.hidden, mlp.dbias1, mlp.hidden, nullptr, stream);
}

}  // namespace mlp

template <typename T>
void mlp_forward_as(const MlpForward& mlp, int device, cudaStream_t stream) {
    const auto run = mlp.channels == 64   ? mlp::alone<T, 64>
                     : mlp.channels == 96 ? mlp::alone<T, 96>
                                          : mlp::alone<T, 128>;
    run(mlp, device, stream);
}

template <typename T>
void mlp_residual_as(const MlpResidual& mlp, int device, cudaStream_t stream) {
    const auto run = mlp.channels == 64   ? mlp::residual<T, 64>
                     : mlp.channels == 96 ? mlp::residual<T, 96>
                                          : mlp::residual<T, 128>;
    run(mlp, device, stream);
}

template <typename T>
void mlp_backward_as(const MlpBackward& mlp, float* partial, int device, cudaStream_t stream) {
    (mlp.channels == 64 ? mlp::backward<T, 64> : mlp::backward<T, 96>)(mlp, partial, device, stream);
}

}  // namespace vmamba::cuda

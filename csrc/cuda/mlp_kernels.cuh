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

// What is around the two products of a forward pass. `begin` makes the operand of the first and what the second adds
// to; `prefetch` asks for the next rows before the products, `read_ahead` reads them when those are done, but before
// their results are written. kPieces: what it has in shared memory.

// The MLP and nothing else.
template <typename T, int Channels>
struct Alone {
    using Arguments = MlpForward;
    static constexpr int kRows = ForwardShape<Channels>::kRows, kBlocks = Channels / 32, kPieces = Channels / 2;
    const Arguments& mlp;
    const float4* bias;
    int g, q;

    __device__ Alone(const Arguments& mlp, float4* shared, int g, int q) : mlp(mlp), bias(shared), g(g), q(q) {
        copy_pairs(shared, mlp.bias2, Channels);
    }
    __device__ __forceinline__ void prefetch(int64_t) const {}
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

// A residual branch, whose sum stays in the registers that the second product adds to. There are none for reading
// ahead. Projects: the branch before it is normalised and projected first.
template <typename X, typename T, int Channels, bool Projects>
struct Residual {
    using Arguments = MlpResidual;
    using Norm = MlpResidual::Norm;
    static constexpr int kRows = ForwardShape<Channels>::kRows, kBlocks = Channels / 32;
    static constexpr int kNumbers = Channels / 2;  // pieces of one number for each channel
    static constexpr int kPieces = Projects ? 5 * kNumbers + kBlocks * ByUnit<Channels>::kPieces : 3 * kNumbers;
    const Arguments& mlp;
    const float4* numbers;  // bias; norm; norm of the branch
    const uint4* projection;
    int g, q;

    __device__ Residual(const Arguments& mlp, float4* shared, int g, int q)
        : mlp(mlp), numbers(shared), projection(reinterpret_cast<uint4*>(shared + 5 * kNumbers)), g(g), q(q) {
        copy_pairs(shared, mlp.bias2, Channels);
        copy_norm(shared + kNumbers, mlp.norm);
        if constexpr (Projects) {
            copy_norm(shared + 3 * kNumbers, mlp.branch_norm);
            for (int block = 0; block < kBlocks; ++block)
                ByUnit<Channels>::stage(
                    reinterpret_cast<uint4*>(shared + 5 * kNumbers) + block * ByUnit<Channels>::kPieces,
                    static_cast<const T*>(mlp.projection), block);
        }
    }
    __device__ __forceinline__ void prefetch(int64_t first) const {
        prefetch_rows<16 * kRows>(mlp.x, first, mlp.rows, Channels * sizeof(X));
        if (mlp.branch) prefetch_rows<16 * kRows>(mlp.branch, first, mlp.rows, Channels * sizeof(T));
    }
    __device__ __forceinline__ void read_ahead(Left (&)[kRows][kBlocks], int64_t) const {}
    __device__ __forceinline__ void begin(Left (&x)[kRows][kBlocks], Tiles (&y)[kRows][kBlocks], int64_t first) const {
        if constexpr (Projects) {
            read<T, false>(y, mlp.branch, first);
            norm(x, y, numbers + 3 * kNumbers, mlp.branch_norm.eps);
            read<X, false>(y, mlp.x, first);
            project(y, x);
        } else {
            read<X, false>(y, mlp.x, first);
            if (mlp.branch) read<T, true>(y, mlp.branch, first);
        }
        norm(x, y, numbers + kNumbers, mlp.norm.eps);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) y[r][block].add(numbers + 16 * block, q);
    }
    __device__ __forceinline__ void write(const Tiles (&y)[kRows][kBlocks], int64_t first) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) write_tiles<X>(mlp.y, y[r], first + 16 * r, mlp.rows, g, q);
    }

  private:
    __device__ static void copy_norm(float4* to, const Norm& norm) {
        copy_pairs(to, norm.weight, Channels);
        copy_pairs(to + kNumbers, norm.bias, Channels);
    }
    template <typename From, bool Add>
    __device__ __forceinline__ void read(Tiles (&y)[kRows][kBlocks], const void* from, int64_t first) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) read_tiles<From, Add>(y[r], from, first + 16 * r, mlp.rows, g, q);
    }
    __device__ __forceinline__ void norm(Left (&to)[kRows][kBlocks], const Tiles (&rows)[kRows][kBlocks],
                                         const float4* parameters, float eps) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) norm_rows<T>(to[r], rows[r], parameters, parameters + kNumbers, eps, q);
    }
    __device__ __forceinline__ void project(Tiles (&y)[kRows][kBlocks], const Left (&x)[kRows][kBlocks]) const {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            Tiles sum[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r] = y[r][block];
            to_hidden<T, Channels>(sum, x, projection + block * ByUnit<Channels>::kPieces, g, q);
#pragma unroll
            for (int r = 0; r < kRows; ++r) y[r][block] = sum[r];
        }
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
    if constexpr (!Resident) {  // what is not in chunks
        wait_for_copies<0>();
        __syncthreads();
    }

    int64_t first = int64_t(blockIdx.x) * kTileRows<Shape> + threadIdx.x / 32 * 16 * kRows;
    Left x[kRows][kBlocks];
    around.read_ahead(x, first);
    for (int tile = 0; tile < tiles; ++tile) {
        Tiles y[kRows][kBlocks];
        around.begin(x, y, first);
        const int64_t written = first;
        first += int64_t(gridDim.x) * kTileRows<Shape>;
        around.prefetch(first);
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

// Calls run(std::true_type{}, bytes) where all chunks fit into shared memory beside `others` pieces, else
// run(std::false_type{}, bytes).
template <typename Shape, typename Run>
void with_residence(int chunks, int others, int device, const Run& run) {
    const auto bytes = [&](int kept) { return (kept * Shape::kPieces + others) * int(sizeof(uint4)); };
    if (bytes(chunks) <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
        run(std::true_type{}, bytes(chunks));
    } else {
        run(std::false_type{}, bytes(kTurns));
    }
}

template <typename T, int Channels, typename Around>
void forward(const typename Around::Arguments& mlp, int device, cudaStream_t stream) {
    using Shape = ForwardShape<Channels>;
    const int others = mlp.hidden / 2 + Around::kPieces;
    with_residence<Shape>(mlp.hidden / kMlpChunk, others, device, [&](auto resident, int bytes) {
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
    const auto run = [&](auto projects) {
        constexpr bool kProjects = decltype(projects)::value;
        if (mlp.x_dtype == Scalar::f32)
            return forward<T, Channels, Residual<float, T, Channels, kProjects>>(mlp, device, stream);
        forward<T, Channels, Residual<T, T, Channels, kProjects>>(mlp, device, stream);
    };
    if (mlp.projection) return run(std::true_type{});
    run(std::false_type{});
}

template <typename T, int Channels>
void backward(const MlpBackward& mlp, float* partial, int device, cudaStream_t stream) {
    using Shape = BackwardShape<Channels>;
    const int blocks = blocks_for(mlp.rows, kTileRows<Shape>, device);
    with_residence<Shape>(mlp.hidden / kMlpChunk, mlp.hidden / 2, device, [&](auto resident, int bytes) {
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

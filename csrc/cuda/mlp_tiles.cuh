// What the kernels of an MLP (mlp_kernels.cuh) are made of: tensor-core products of rows that stay in registers, and
// weights in shared memory, all of them where they fit, else a few chunks, in turns.
//
// Products sum over their operands' columns in any order, as long as both have the same, and what is a column of a
// result is free too. So lanes of a quad take eight neighbours each of 32 columns: in 16 bits that is one load of 16
// bytes, from memory or from shared memory, for two products.
#pragma once

#include "device.cuh"
#include "mlp.h"

namespace vmamba::cuda {
namespace mlp {

constexpr int kTurns = 3;  // chunks in shared memory where not all fit

// ---------------------------------------------------------------------------------------------------------------------
// Operands
// ---------------------------------------------------------------------------------------------------------------------

// Left operands of 16 rows and 32 columns: two products of 16 columns.
struct Left {
    uint32_t first[4], second[4];

    // From rows g and g + 8, eight columns of each.
    __device__ static __forceinline__ Left of(const uint4& top, const uint4& bottom) {
        return {{top.x, bottom.x, top.y, bottom.y}, {top.z, bottom.z, top.w, bottom.w}};
    }
    // The same in other registers. A product and a load or store want four registers in a row, not the same four;
    // without an operation in between, ptxas keeps what the latter wants, and copies it for every single product.
    __device__ __forceinline__ Left apart() const {
        const uint32_t zero = threadIdx.y;  // which the compiler does not know
        Left left;
#pragma unroll
        for (int i = 0; i < 4; ++i) left.first[i] = first[i] | zero, left.second[i] = second[i] | zero;
        return left;
    }
    __device__ __forceinline__ uint4 top() const { return {first[0], first[2], second[0], second[2]}; }
    __device__ __forceinline__ uint4 bottom() const { return {first[1], first[3], second[1], second[3]}; }
};

template <typename T>
__device__ __forceinline__ void mma(float (&acc)[4], const Left& a, const uint4& b) {
    mma_16bit<T>(acc, a.first, b.x, b.y);
    mma_16bit<T>(acc, a.second, b.z, b.w);
}

// Numbers for the columns of results, as lanes take them: Tiles::fill.
__device__ inline void copy_pairs(float4* to, const float* from, int count) {
    for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
        const float* pair = from + i / 16 * 32 + i % 4 * 8 + i / 4 % 4 * 2;
        to[i] = {pair[0], pair[1], pair[0], pair[1]};
    }
}

// The column, of 32, that a result's tile j of eight has in place g.
__device__ __forceinline__ int column_of(int j, int g) { return 8 * (g / 2) + 2 * j + g % 2; }

// Four tiles of a result of 16 rows, 32 columns: a lane has columns 8q to 8q + 7 of rows g and g + 8.
struct Tiles {
    alignas(16) float of[4][4];

    // With the same number in all rows of a column.
    __device__ __forceinline__ void fill(const float4* pairs, int q) {
#pragma unroll
        for (int j = 0; j < 4; ++j) *reinterpret_cast<float4*>(of[j]) = pairs[4 * j + q];
    }
    __device__ __forceinline__ void add(const float4* pairs, int q) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float4 pair = pairs[4 * j + q];
            of[j][0] += pair.x, of[j][1] += pair.y, of[j][2] += pair.z, of[j][3] += pair.w;
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < 4; ++j) of[j][0] = of[j][1] = of[j][2] = of[j][3] = 0.f;
    }
    template <typename T>
    __device__ __forceinline__ Left rounded() const {
        Left left;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            left.first[i] = pack<T>(of[0][2 * i], of[0][2 * i + 1]);
            left.first[2 + i] = pack<T>(of[1][2 * i], of[1][2 * i + 1]);
            left.second[i] = pack<T>(of[2][2 * i], of[2][2 * i + 1]);
            left.second[2 + i] = pack<T>(of[3][2 * i], of[3][2 * i + 1]);
        }
        return left;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Weights in shared memory
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_async(uint4* to, const void* from) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 32 rows of `Channels` numbers: a chunk of a weight (hidden, channels). Two neighbouring rows are read together, 64
// bytes of each, which have to be in different banks.
template <int Channels>
struct ByUnit {
    static constexpr int kRowPieces = Channels / 8, kPieces = kMlpChunk * kRowPieces;

    __device__ static __forceinline__ int piece(int row, int block, int q) {
        const int odd_stride = Channels / 32 % 2;
        return row * kRowPieces + (odd_stride ? block : block ^ row % 2) * 4 + q;
    }
    template <typename T>
    __device__ static __forceinline__ void stage(uint4* to, const T* weight, int chunk) {
        const auto* from = reinterpret_cast<const uint4*>(weight) + int64_t(chunk) * kPieces;
        for (int i = threadIdx.x; i < kPieces; i += blockDim.x)
            copy_async(to + piece(i / kRowPieces, i % kRowPieces / 4, i % 4), from + i);
    }
};

// `Channels` rows of 32 numbers: a chunk of a weight (channels, hidden).
template <int Channels>
struct ByChannel {
    static constexpr int kRowPieces = kMlpChunk / 8, kPieces = Channels * kRowPieces;

    template <typename T>
    __device__ static __forceinline__ void stage(uint4* to, const T* weight, int chunk, int hidden) {
        for (int i = threadIdx.x; i < kPieces; i += blockDim.x)
            copy_async(to + i, weight + int64_t(i / kRowPieces) * hidden + chunk * kMlpChunk + i % kRowPieces * 8);
    }
};

// hidden += x * weight, of a chunk's 32 units.
template <typename T, int Channels, int Rows>
__device__ __forceinline__ void to_hidden(Tiles (&hidden)[Rows], const Left (&x)[Rows][Channels / 32],
                                          const uint4* weight, int g, int q) {
#pragma unroll
    for (int block = 0; block < Channels / 32; ++block)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint4 b = weight[ByUnit<Channels>::piece(column_of(j, g), block, q)];
#pragma unroll
            for (int r = 0; r < Rows; ++r) mma<T>(hidden[r].of[j], x[r][block], b);
        }
}

// result += hidden * weight, of a chunk's 32 units.
template <typename T, int Channels, int Rows>
__device__ __forceinline__ void from_hidden(Tiles (&result)[Rows][Channels / 32], const Left (&hidden)[Rows],
                                            const uint4* weight, int g, int q) {
#pragma unroll
    for (int block = 0; block < Channels / 32; ++block)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint4 b = weight[(block * 32 + column_of(j, g)) * 4 + q];
#pragma unroll
            for (int r = 0; r < Rows; ++r) mma<T>(result[r][block].of[j], hidden[r], b);
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows in memory
// ---------------------------------------------------------------------------------------------------------------------

// Rows g and g + 8 of 16, columns 8q to 8q + 7 of every 32; zero behind the last row.
template <typename T, int Channels>
__device__ __forceinline__ void load_rows(Left (&to)[Channels / 32], const void* from, int64_t first, int64_t rows,
                                          int g, int q) {
    const auto* source = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int block = 0; block < Channels / 32; ++block) {
        uint4 both[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = first + g + 8 * half;
            if (row < rows) both[half] = __ldg(source + row * (Channels / 8) + block * 4 + q);
        }
        to[block] = Left::of(both[0], both[1]).apart();
    }
}

// The inverse, to 32 columns from `column` on.
template <typename T>
__device__ __forceinline__ void store_rows(void* to, const Left& from, int64_t first, int64_t rows, int columns,
                                           int column, int g, int q) {
    T* target = static_cast<T*>(to) + (first + g) * columns + column + 8 * q;
    if (first + g < rows) *reinterpret_cast<uint4*>(target) = from.top();
    if (first + g + 8 < rows) *reinterpret_cast<uint4*>(target + 8 * int64_t{columns}) = from.bottom();
}

// Has a warp's rows brought from memory to the L2 cache.
template <int Rows>
__device__ __forceinline__ void prefetch_rows(const void* from, int64_t first, int64_t rows, int64_t row_bytes) {
    constexpr int kLine = 128;
    const char* begin = static_cast<const char*>(from) + first * row_bytes;
    const int64_t bytes = min(int64_t{Rows}, rows - first) * row_bytes;  // negative behind the last row
    for (int64_t at = threadIdx.x % 32 * kLine; at < bytes; at += 32 * kLine)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(begin + at));
}

// The eight neighbours of a row that a lane has of every 32 columns, in pairs.
template <typename T>
struct Eight {
    float2 pairs[4];
    __device__ __forceinline__ explicit Eight(const T* from) {
        if constexpr (std::is_same_v<T, float>) {
            const float4 low = __ldg(reinterpret_cast<const float4*>(from));
            const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
            pairs[0] = {low.x, low.y}, pairs[1] = {low.z, low.w}, pairs[2] = {high.x, high.y},
            pairs[3] = {high.z, high.w};
        } else {
            const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
            pairs[0] = unpack<T>(bits.x), pairs[1] = unpack<T>(bits.y), pairs[2] = unpack<T>(bits.z),
            pairs[3] = unpack<T>(bits.w);
        }
    }
};

// 16 rows as a result has them, from memory, or added to what is there; zero behind the last row.
template <typename T, bool Add, int Blocks>
__device__ __forceinline__ void read_tiles(Tiles (&to)[Blocks], const void* from, int64_t first, int64_t rows, int g,
                                           int q) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = first + g + 8 * half;
        const T* source = static_cast<const T*>(from) + row * (32 * Blocks) + 8 * q;
#pragma unroll
        for (int block = 0; block < Blocks; ++block) {
            if (!Add)
#pragma unroll
                for (int j = 0; j < 4; ++j) to[block].of[j][2 * half] = to[block].of[j][2 * half + 1] = 0.f;
            if (row >= rows) continue;
            const Eight<T> read(source + 32 * block);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float* pair = to[block].of[j] + 2 * half;
                pair[0] = Add ? pair[0] + read.pairs[j].x : read.pairs[j].x;
                pair[1] = Add ? pair[1] + read.pairs[j].y : read.pairs[j].y;
            }
        }
    }
}

// The inverse.
template <typename T, int Blocks>
__device__ __forceinline__ void write_tiles(void* to, const Tiles (&from)[Blocks], int64_t first, int64_t rows, int g,
                                            int q) {
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t row = first + g + 8 * half;
                auto* target =
                    reinterpret_cast<float4*>(static_cast<float*>(to) + row * (32 * Blocks) + 32 * block + 8 * q);
                const auto quarter = [&](int j) {
                    const float *low = from[block].of[j] + 2 * half, *high = from[block].of[j + 1] + 2 * half;
                    return make_float4(low[0], low[1], high[0], high[1]);
                };
                if (row < rows) target[0] = quarter(0), target[1] = quarter(2);
            }
        } else {
            store_rows<T>(to, from[block].template rounded<T>(), first, rows, 32 * Blocks, 32 * block, g, q);
        }
    }
}

// LayerNorm of 16 rows, as an operand.
template <typename T, int Blocks>
__device__ __forceinline__ void norm_rows(Left (&to)[Blocks], const Tiles (&rows)[Blocks], const float4* weight,
                                          const float4* bias, float eps, int q) {
    float mean[2], rstd[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const auto sum = [&](const auto& term) {
            float total = 0.f;
#pragma unroll
            for (int i = 0; i < 8 * Blocks; ++i) total += term(rows[i / 8].of[i / 2 % 4][2 * half + i % 2]);
            return quad_sum(total) * (1.f / (32 * Blocks));
        };
        mean[half] = sum([](float x) { return x; });
        rstd[half] = rsqrtf(sum([&](float x) { return (x - mean[half]) * (x - mean[half]); }) + eps);
    }
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
        Tiles normed;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float4 w = weight[16 * block + 4 * j + q], b = bias[16 * block + 4 * j + q];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                normed.of[j][i] =
                    fmaf((rows[block].of[j][i] - mean[i / 2]) * rstd[i / 2], i % 2 ? w.y : w.x, i % 2 ? b.y : b.x);
        }
        to[block] = normed.template rounded<T>();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The loop over chunks
// ---------------------------------------------------------------------------------------------------------------------

// Calls stage(to, chunk) for the chunks of every tile of rows in turn, and use(weights, chunk) when they are there.
// Resident: all chunks are staged once, and warps go on without waiting for each other.
template <bool Resident, int Pieces>
struct Chunks {
    uint4* shared;
    int count;
    int staged = 0, used = 0, all = 0;

    template <typename Stage>
    __device__ __forceinline__ void begin(int tiles, const Stage& stage) {
        all = tiles * count;
        const int first = Resident ? count : kTurns - 1;
        for (int i = 0; i < first; ++i) next(stage);
        if constexpr (Resident) {
            wait_for_copies<0>();
            __syncthreads();
        }
    }
    template <typename Stage, typename Use>
    __device__ __forceinline__ void walk(const Stage& stage, const Use& use) {
#pragma unroll 1
        for (int chunk = 0; chunk < count; ++chunk) {
            if constexpr (Resident) {
                use(shared + chunk * Pieces, chunk);
            } else {
                wait_for_copies<kTurns - 2>();
                __syncthreads();
                next(stage);
                use(shared + used % kTurns * Pieces, chunk);
                ++used;
            }
        }
    }

  private:
    template <typename Stage>
    __device__ __forceinline__ void next(const Stage& stage) {
        if (Resident || staged < all) stage(shared + (Resident ? staged : staged % kTurns) * Pieces, staged % count);
        ++staged;
        commit();
    }
};

}  // namespace mlp
}  // namespace vmamba::cuda

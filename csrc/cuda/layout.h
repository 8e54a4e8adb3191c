// How blocks lay out their shared memory. The plan asks, so that no block is given more channels than its memory holds.
#pragma once

#include <cstdint>

namespace vmamba::cuda {

constexpr int kPageSteps = 64;  // a page: the steps that a block stages at a time

// Floats from one row of low-rank steps, or of the weights that expand them, to the next; and from one step to the next
// of a page's (64, tile) expanded steps. Chosen so that the fragment loads in device.cuh touch each bank once.
__host__ __device__ constexpr int rank_columns(int rank) { return (rank + 7) / 8 * 8; }
__host__ __device__ constexpr int rank_stride(int rank) { return rank_columns(rank) + 4; }
__host__ __device__ constexpr int delta_stride(int tile) { return tile + 8; }

// Offsets in floats; sizes in bytes. The page's tables of positions come first.
struct ForwardShared {
    int64_t low, gains, weights, delta, bytes;
    __host__ __device__ constexpr ForwardShared(int rank, int group, int tile)
        : low(3 * kPageSteps),
          gains(low + (rank ? kPageSteps * rank_stride(rank) : 0)),
          weights(gains + kPageSteps * 2 * group),
          delta(weights + (rank ? tile * rank_stride(rank) : 0)),
          bytes((delta + kPageSteps * delta_stride(tile)) * 4) {}
};

// The same in 16-bit numbers: 16 features make an operand, and rows of 8 features that are loaded together lie in
// different banks.
__host__ __device__ constexpr int packed_columns(int rank) { return (rank + 15) / 16 * 16; }
__host__ __device__ constexpr int packed_stride(int rank) { return packed_columns(rank) + 8; }

// packed: rows in bfloat16, weights in two of them, a high and a low part.
struct BackwardShared {
    int64_t low, gains, weights, delta, sums, bytes;
    __host__ __device__ constexpr BackwardShared(int rank, int tile, bool packed)
        : low(3 * kPageSteps),
          gains(low + (rank == 0 ? 0 : kPageSteps * (packed ? packed_stride(rank) / 2 : rank_stride(rank)))),
          weights(gains + kPageSteps * 2),
          delta(weights + (rank == 0 ? 0 : tile * (packed ? packed_stride(rank) : rank_stride(rank)))),
          sums(delta + kPageSteps * delta_stride(tile)),
          bytes((sums + tile / 32 * kPageSteps * 2) * 4) {}
};

}  // namespace vmamba::cuda

// How the backward of many states (backward_wide.cuh) is laid out over lanes and in shared memory.
#pragma once

#include "plan.h"

namespace vmamba::cuda {

constexpr int kParts = 4;                         // lanes of a channel
constexpr int kPartStates = kWideGroup / kParts;  // states of a lane
constexpr int kWarpChannels = 32 / kParts;        // channels of a warp
constexpr int kWideSpan = 8;                      // steps whose states and decays are in registers
constexpr int kWideGains = 2 * kWideGroup;        // floats of a step's B and C

// Kernels exist for tiles of up to 64 and up to 32 channels: the small one for few channels, and where a block has not
// enough shared memory for the other.
constexpr int kWideTile = 64, kSmallWideTile = 32;
template <int Tile>
constexpr int kWideWarps = Tile / kWarpChannels;
template <int Tile>
constexpr int kWideStride = Tile + 4;  // floats between steps of a page
template <int Tile>
constexpr int kStepSums = kWideWarps<Tile> * kWideGains;  // floats between steps of the warps' sums over channels

// In floats. What does not depend on the rank comes first, so that its addresses are known when compiled.
template <int Tile>
struct BackwardWideShared {
    static constexpr int kGains = 3 * kPageSteps;
    static constexpr int kSteps = kGains + kPageSteps * kWideGains;
    static constexpr int kInputs = kSteps + kPageSteps * kWideStride<Tile>;
    static constexpr int kGrads = kInputs + kPageSteps * kWideStride<Tile>;
    static constexpr int kStates = kGrads + kPageSteps * kWideStride<Tile>;
    static constexpr int kSums = kStates + (kPageSteps / kWideSpan - 1) * Tile * kWideGroup;
    static constexpr int kLow = kSums + kWideSpan * kStepSums<Tile>;
    int64_t weights, bytes;
    __host__ __device__ explicit BackwardWideShared(int rank) {
        weights = kLow + (rank ? kPageSteps * rank_stride(rank) : 0);
        bytes = (weights + (rank ? Tile * rank_stride(rank) : 0)) * 4;
    }
};

}  // namespace vmamba::cuda

// How a scan is cut into thread blocks, and where its intermediate results lie in the workspace. Plain C++: decided
// from sizes alone, never from values, so that the choice costs no synchronisation and can be captured.
//
// Vocabulary. A *slice* is one direction with one group of states (all of them up to 16; larger N gives several groups,
// whose outputs add up). A *page* is 64 steps: what a block stages in shared memory at a time. A *chunk* is a run of
// pages that one block walks; with several chunks a summary pass and a fold come first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../scan.h"
#include "layout.h"

namespace vmamba::cuda {

// The backward restarts from checkpoints. With one state they are cheap: one for every span of steps it holds in
// registers. With more states it recomputes a page from one checkpoint.
constexpr int64_t checkpoint_interval(int64_t states) { return states == 1 ? 16 : kPageSteps; }
constexpr int kSpan = 16;  // steps that the one-state backward holds in registers
static_assert(kSpan == checkpoint_interval(1));
constexpr int kWideGroup = 16;  // states in a group, where there is more than one state

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Cut {
    int group = 1;       // states in a group
    int groups = 1;      // groups of states in a direction
    int tile = 32;       // channels in a block
    int tiles = 1;       // blocks over the channels
    int lanes = 1;       // threads of a channel, in the forward; each has its share of a group's states
    int64_t chunks = 1;  // blocks over the steps
    int64_t chunk_steps = kPageSteps;
};

// Splits D channels into equal tiles of a multiple of `of`, none larger than `most`.
constexpr int balanced_tile(int64_t channels, int most, int of) {
    const int64_t tiles = ceil_div(channels, most);
    return static_cast<int>(round_up(ceil_div(channels, tiles), of));
}

// Tiles of a multiple of 32 channels for whose blocks `limit` bytes of shared memory are enough.
template <typename Layout>
constexpr int fitting_tile(int64_t channels, int most, int64_t limit, Layout layout) {
    int tile = balanced_tile(channels, most, 32);
    while (tile > 32 && layout(tile).bytes > limit) tile = balanced_tile(channels, most -= 32, 32);
    return tile;
}

// How many warps make a large GPU busy. With `few` or less of them from the rows alone, steps are cut in chunks, so
// that there are `wanted` at most: chunks cost a summary pass, which they have to win back.
struct Fill {
    int64_t few, wanted;
};

inline int group_of(const Scan& scan) { return scan.states == 1 ? 1 : kWideGroup; }

inline Cut cut(const Scan& scan, int tile, int lanes_per_channel, const Fill& fill) {
    Cut c;
    c.group = group_of(scan);
    c.groups = static_cast<int>(ceil_div(std::max<int64_t>(scan.states, 1), c.group));
    c.tile = tile;
    c.tiles = static_cast<int>(ceil_div(scan.channels, c.tile));
    c.lanes = lanes_per_channel;
    const int64_t pages = std::max<int64_t>(1, ceil_div(scan.steps, kPageSteps));
    const int64_t warps =
        std::max<int64_t>(1, scan.batch * scan.directions * c.groups * c.tiles * (c.tile * lanes_per_channel / 32));
    const int64_t chunks = warps > fill.few ? 1 : std::clamp<int64_t>(fill.wanted / warps, 1, pages);
    c.chunk_steps = ceil_div(pages, chunks) * kPageSteps;
    c.chunks = ceil_div(pages * kPageSteps, c.chunk_steps);
    return c;
}

constexpr int kScanThreads = 128;  // of a block, at most

constexpr int forward_tile(int64_t channels, int rank, int group, int64_t limit, int lanes = 1) {
    return fitting_tile(channels, kScanThreads / lanes, limit,
                        [=](int tile) { return ForwardShared(rank, group, tile); });
}
constexpr int backward_tile(int64_t channels, int rank, bool packed, int64_t limit) {
    return fitting_tile(channels, 192, limit, [=](int tile) { return BackwardShared(rank, tile, packed); });
}

// The least shared memory a block can have on the GPUs we build for, and the largest rank: together they fit.
constexpr int64_t kLeastShared = 99 * 1024;
constexpr int kMostRank = 128;
static_assert(ForwardShared(kMostRank, kWideGroup, forward_tile(2048, kMostRank, kWideGroup, kLeastShared)).bytes <=
              kLeastShared);
constexpr bool backward_fits(int64_t channels, int rank, bool packed) {
    return BackwardShared(rank, backward_tile(channels, rank, packed, kLeastShared), packed).bytes <= kLeastShared;
}
static_assert(backward_fits(2048, kMostRank, true) && backward_fits(2048, kMostRank, false));
static_assert(backward_fits(768, 48, true) && backward_fits(768, 48, false));
static_assert(backward_fits(1024, 64, true) && backward_fits(1024, 64, false));

constexpr int64_t kMultiprocessorBytes = 227 * 1024;  // of shared memory, on a large GPU

// Warps of the forward of many states that a multiprocessor holds: registers are enough for 12, and shared memory has
// to be. More chunks than that would begin a second round.
inline int64_t wide_warps(int rank, int tile) {
    const int64_t blocks = kMultiprocessorBytes / (ForwardShared(rank, kWideGroup, tile).bytes + 1024);
    return std::min<int64_t>(blocks, 12 * 32 / tile) * tile / 32;
}

// Whether 16-bit numbers can be read `count` at a time from every such number of features on; and in pairs.
inline bool in_packs(const Rows& rows, int count) {
    return reinterpret_cast<uintptr_t>(rows.data) % (2 * count) == 0 && rows.image_stride % count == 0 &&
           rows.direction_stride % count == 0 && rows.position_stride % count == 0;
}
inline bool in_pairs(const Rows& rows) { return in_packs(rows, 2); }

// Whether rows of many states are too few for one lane a channel, but enough for two: those walk all steps in one pass,
// with half of the states each, where chunks would take a summary pass. On an H200 few steps are faster so, and many
// only where the rows are nearly enough.
inline bool takes_two_lanes(const Scan& scan, const Cut& chunked) {
    const int64_t warps = scan.batch * scan.directions * chunked.groups * chunked.tiles * (chunked.tile / 32);
    return scan.states > 1 && scan.result != Result::states && chunked.chunks > 1 &&
           (warps >= 480 || (warps >= 112 && scan.steps <= 4 * kPageSteps));
}

// Whether the long forward (forward_long.cuh) takes a scan: sixteen states, results that are sums, and rows and inputs
// of 16 bits that can be read eight and sixteen bytes at a time.
constexpr int kLongTile = 32;      // channels of a block
constexpr int kLongLanes = 4;      // of a channel; no other forward has as many
constexpr int kLongMostRank = 16;  // what one product takes
inline bool serves_long(const Scan& s) {
    return s.states == kWideGroup && s.dtype != Scalar::f32 && s.result != Result::states && s.rank > 0 &&
           s.rank % 4 == 0 && s.rank <= kLongMostRank && s.channels % kLongTile == 0 && !s.reset.data &&
           in_packs(s.u, 8) && in_packs(s.dt, 4) && in_packs(s.B, 4) && in_packs(s.C, 4);
}
// Whether it is faster than chunks, or than two lanes a channel: of few steps with half as many rows (on an H200).
inline bool takes_long(const Scan& s, const Cut& chunked) {
    const int64_t warps = s.batch * s.directions * s.channels * kLongLanes / 32;
    return serves_long(s) && chunked.chunks > 1 && (warps >= 768 || (warps >= 384 && s.steps <= 4 * kPageSteps));
}

// A summary pass costs about as much as the scan itself, except before the backward of many states: a fifth there.
// limit: bytes of shared memory a block can have. wide_tile: channels of a block of many states, at most.
inline Cut forward_cut(const Scan& scan, int64_t limit) {
    const auto tile_of = [&](int lanes) {
        return forward_tile(std::max<int64_t>(scan.channels, 1), static_cast<int>(scan.rank), group_of(scan), limit,
                            lanes);
    };
    const int tile = tile_of(1);
    const Fill fill{132 * 20 / 3, scan.states == 1 ? 132 * 20 : 132 * wide_warps(static_cast<int>(scan.rank), tile)};
    const Cut chunked = cut(scan, tile, 1, fill);
    if (takes_long(scan, chunked)) return cut(scan, kLongTile, kLongLanes, {0, 1});
    return takes_two_lanes(scan, chunked) ? cut(scan, tile_of(2), 2, {0, 1}) : chunked;
}
// Whether the one-state backward keeps its pages in 16 bits: BackwardPage (backward_page.cuh) for each dtype.
inline bool packed(const Scan& scan) { return scan.dtype == Scalar::bf16; }
inline Cut backward_cut(const Scan& scan, int64_t limit, int wide_tile) {
    const int64_t channels = std::max<int64_t>(scan.channels, 1);
    if (scan.states == 1)
        return cut(scan, backward_tile(channels, static_cast<int>(scan.rank), packed(scan), limit), 1,
                   {132 * 16 / 3, 132 * 16});
    return cut(scan, balanced_tile(channels, wide_tile, 16), 4, {132 * 16 / 2, 132 * 16 * 4});
}

// The fused forward (fused.cuh). Where the features are eight or less ("small"), all of them and the next turn's inputs
// fit in registers, and a lane walks 16 steps; otherwise eight, with more warps instead.
inline bool fused_small(int64_t rank) { return rank + 2 <= 8; }
constexpr int fused_lane_steps(bool small) { return small ? 16 : 8; }
constexpr int fused_most_warps(bool small) { return small ? 8 : 16; }

// Its shared memory: the merged result of 16 channels, and what the warps hand to each other.
constexpr int64_t fused_merged_bytes(int64_t length) { return (length + 1) / 2 * 2 * 16 * 4; }
constexpr int64_t fused_shared_bytes(int64_t length) { return fused_merged_bytes(length) + 2 * 16 * 8 * 16; }

// Warps of a block. Handing states from warp to warp costs time, so only as many as fill a multiprocessor together with
// the blocks beside it; and no more than make the fewest rounds over the steps.
inline int fused_warps(const Scan& s) {
    const bool small = fused_small(s.rank);
    constexpr int64_t kWarpsWanted = 16;
    const int64_t beside = std::max<int64_t>(1, kMultiprocessorBytes / fused_shared_bytes(s.length));
    const int64_t most = std::min<int64_t>(fused_most_warps(small), ceil_div(kWarpsWanted, beside));
    const int64_t tiles = std::max<int64_t>(1, ceil_div(s.steps, 4 * fused_lane_steps(small)));
    return static_cast<int>(ceil_div(tiles, ceil_div(tiles, most)));
}
inline int64_t fused_padded_steps(const Scan& s) {
    return round_up(s.steps, fused_warps(s) * 4 * fused_lane_steps(fused_small(s.rank)));
}

// Operand blocks of 16 features that hold the low-rank ones and B and C; 0 where they are eight or less and share a
// block with their low halves.
inline int fused_blocks(int64_t rank) { return fused_small(rank) ? 0 : rank + 2 <= 16 ? 1 : rank + 2 <= 32 ? 2 : 4; }

// Whether low-rank steps, B and C of one state stand side by side in rows of 16-bit numbers, as models make them, that
// can be read in pairs, by a warp at most.
inline bool rows_in_pairs(const Scan& s) {
    const auto at = [](const Rows& rows) { return reinterpret_cast<uintptr_t>(rows.data); };
    const auto same_strides = [](const Rows& a, const Rows& b) {
        return a.image_stride == b.image_stride && a.direction_stride == b.direction_stride &&
               a.position_stride == b.position_stride;
    };
    return s.states == 1 && s.dtype != Scalar::f32 && s.rank > 0 && s.rank % 2 == 0 && s.rank + 2 <= 64 &&
           at(s.B) == at(s.dt) + 2 * s.rank && at(s.C) == at(s.B) + 2 && same_strides(s.dt, s.B) &&
           same_strides(s.dt, s.C) && in_pairs(s.dt);
}

// A few blocks that walk many steps leave most of a GPU idle: chunks are faster then (measured on an H200, 132
// multiprocessors).
inline bool fused_idles(const Scan& s) { return s.batch * (s.channels / 16) <= 48 && s.steps >= 640; }

// Whether the fused forward takes this scan: one state, 16-bit inputs, one table, rows in pairs, a map whose result for
// 16 channels fits in shared memory, and enough blocks.
inline bool fused_takes(const Scan& s, int64_t shared_bytes) {
    return !fused_idles(s) && s.result == Result::merged && s.dt_softplus && s.channels % 16 == 0 && rows_in_pairs(s) &&
           in_pairs(s.u) && s.u.direction_stride == 0 && s.route.image_stride == 0 &&
           s.param_route.data == s.route.data && !s.reset.data && fused_shared_bytes(s.length) <= shared_bytes &&
           s.steps > 0 && s.steps < (1 << 20);
}

// Division of 32-bit numbers by a divisor known when a kernel is launched.
struct Divisor {
    uint32_t by = 1, multiplier = 0, shift = 0;

    Divisor() = default;
    explicit Divisor(uint32_t divisor) : by(divisor) {
        while ((uint64_t{1} << shift) < divisor) ++shift;
        multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
    }
};

// Hands out 256-byte aligned pieces of the workspace; with a null base it only measures.
class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(int64_t count) {
        const int64_t at = used_;
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
        return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
    }

    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

}  // namespace vmamba::cuda

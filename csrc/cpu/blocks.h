// What the driver asks of a thread: one image, one block of channels. Shared by the driver and the kernels of each
// instruction set; everything here is plain data.
#pragma once

#include "../scan.h"

namespace vmamba::cpu {

constexpr int kMaxTileSteps = 16;  // steps whose dt is formed together; checkpoint_steps must be a multiple

struct ForwardTask {
    const Scan* scan;
    int64_t image;
    int64_t channel;     // first channel of the block
    int count;           // channels in the block that exist
    float* out;          // the whole result
    float* checkpoints;  // all of them; null where none are kept
};

// Sums of gradients in float32. `u` and `dt_full` cover the whole input; what a block shares with other blocks or an
// image with other images is summed into the task's own part, which the driver adds up in a fixed order.
struct BackwardTask {
    const Scan* scan;
    int64_t image;
    int64_t channel;
    int count;
    const float* grad;         // of the whole result
    const float* checkpoints;  // all of them
    float* u;                  // (batch, L, D) or (batch, K, L, D)
    float* dt_full;            // (batch, L, K or 1, D), null for a low-rank dt
    float* dt_low;             // (L, K or 1, R) of this block; null for a full dt
    float* B;                  // (L, K or 1, N) of this block
    float* C;                  // like B; null without C
    float* A;                  // (K or 1, D, N) of this image, like the following
    float* D;                  // (K or 1, D), may be null
    float* dt_weight;          // (K or 1, D, R), may be null
    float* dt_bias;            // (K or 1, D), may be null
};

// The kernels of one instruction set, and the sizes the driver needs to split the work for them.
struct BlockKernels {
    const char* name;
    int lanes;
    // Blocks are one or two vectors wide.
    void (*forward)(const ForwardTask&, int vectors, float* memory);
    void (*backward)(const BackwardTask&, int vectors, float* memory);
};

// Floats of scratch memory a task needs.
int64_t forward_memory(const Scan& scan, int width);
int64_t backward_memory(const Scan& scan, int width);

const BlockKernels& baseline_kernels();
const BlockKernels& avx2_kernels();
const BlockKernels& avx512_kernels();

}  // namespace vmamba::cpu

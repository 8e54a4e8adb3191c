// The block kernels for the instruction set every machine of the architecture has (SSE2, NEON).
#include "blocks.h"

#define VMAMBA_LANES 4
#include "scan_block.h"

const vmamba::cpu::BlockKernels& vmamba::cpu::baseline_kernels() {
    static constexpr BlockKernels kernels{"baseline", kLanes, run_forward, run_backward};
    return kernels;
}

// The block kernels for AVX2 and FMA.
#include "blocks.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define VMAMBA_LANES 8
#include "scan_block.h"

const vmamba::cpu::BlockKernels& vmamba::cpu::avx2_kernels() {
    static constexpr BlockKernels kernels{"avx2", kLanes, run_forward, run_backward};
    return kernels;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const vmamba::cpu::BlockKernels& vmamba::cpu::avx2_kernels() { return baseline_kernels(); }
#endif

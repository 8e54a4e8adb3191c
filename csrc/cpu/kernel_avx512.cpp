// The block kernels for AVX-512 (F, BW, DQ, VL).
#include "blocks.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

#define VMAMBA_LANES 16
#include "scan_block.h"

const vmamba::cpu::BlockKernels& vmamba::cpu::avx512_kernels() {
    static constexpr BlockKernels kernels{"avx512", kLanes, run_forward, run_backward};
    return kernels;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const vmamba::cpu::BlockKernels& vmamba::cpu::avx512_kernels() { return baseline_kernels(); }
#endif

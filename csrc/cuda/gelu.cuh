// GELU, x Phi(x) of the normal distribution, and its derivative.
#pragma once

#include "device.cuh"

namespace vmamba::cuda {

constexpr float kInvSqrt2 = 0.70710678118654752f, kInvSqrt2Pi = 0.39894228040143268f;

// GELU, to a small part of what rounding the result to T costs: log2 Phi(-|x|) is a polynomial, fitted on [0, 5.5] to a
// relative error of 3e-4 (bfloat16) or 6e-6 (float16). It falls beyond, so that nothing needs a bound.
template <typename T>
__device__ __forceinline__ float gelu_fast(float x) {
    const float a = fabsf(x);
    float p;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        p = fmaf(-0.00023325114f, a, 0.0048697707f);
        p = fmaf(p, a, -0.044598997f);
        p = fmaf(p, a, -0.46968114f);
        p = fmaf(p, a, -1.1462607f);
        p = fmaf(p, a, -1.0003591f);
    } else {
        p = fmaf(-1.7934585e-06f, a, 6.0904240e-05f);
        p = fmaf(p, a, -0.00092602952f);
        p = fmaf(p, a, 0.0084937587f);
        p = fmaf(p, a, -0.053937849f);
        p = fmaf(p, a, -0.45848051f);
        p = fmaf(p, a, -1.1512468f);
        p = fmaf(p, a, -0.99999547f);
    }
    return fmaf(-a, exp2_fast(p), fmaxf(x, 0.0f));
}

// GELU and its derivative, Phi(x) + x phi(x), by Abramowitz and Stegun 7.1.26, right to 7e-8: it has the exponential
// that phi has, and with it there are about half as many instructions as with erff, none of them a branch.
struct GeluSlope {
    float value, slope;
    __device__ __forceinline__ explicit GeluSlope(float x) {
        const float e = exp2_fast(-0.5f * kLog2e * x * x);
        const float t = reciprocal_fast(1.0f + 0.3275911f * kInvSqrt2 * fabsf(x));
        float tail = 0.5f * 1.061405429f;
        tail = fmaf(tail, t, 0.5f * -1.453152027f);
        tail = fmaf(tail, t, 0.5f * 1.421413741f);
        tail = fmaf(tail, t, 0.5f * -0.284496736f);
        tail = fmaf(tail, t, 0.5f * 0.254829592f);
        tail *= t * e;
        const float phi = x < 0.0f ? tail : 1.0f - tail;
        value = x * phi;
        slope = fmaf(x * kInvSqrt2Pi, e, phi);
    }
};

}  // namespace vmamba::cuda

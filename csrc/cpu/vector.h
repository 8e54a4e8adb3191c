// Vectors of VMAMBA_LANES floats in the compiler's own vector types, and the few functions the scan needs on them.
// Included by one translation unit per instruction set, each inside its own namespace (see scan_block.h).
#pragma once

namespace {

typedef float Vec __attribute__((vector_size(VMAMBA_LANES * sizeof(float))));
typedef int IntVec __attribute__((vector_size(VMAMBA_LANES * sizeof(int))));
constexpr int kLanes = VMAMBA_LANES;

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// The first `count` floats, zeros behind them.
inline Vec load_some(const float* p, int count) {
    if (count >= kLanes) return load(p);
    Vec v = {};
    for (int i = 0; i < count; ++i) v[i] = p[i];
    return v;
}

inline void store_some(float* p, Vec v, int count) {
    if (count >= kLanes) return store(p, v);
    for (int i = 0; i < count; ++i) p[i] = v[i];
}

inline float sum(Vec v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// Comparisons are written so that a NaN falls through to the result.
inline Vec at_least(Vec x, float low) { return x < low ? splat(low) : x; }
inline Vec at_most(Vec x, float high) { return x > high ? splat(high) : x; }

constexpr float kLog2e = 1.44269504088896341f;

// 2^x to 1.2e-7 relative: x = i + f with |f| <= 1/2, a degree-6 polynomial for 2^f, i put into the exponent bits.
inline Vec exp2(Vec x) {
    x = at_most(at_least(x, -126.0f), 127.0f);
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
    const Vec shifted = x + kRound;
    const Vec f = x - (shifted - kRound);
    Vec p = splat(1.540353039338161e-4f);
    p = p * f + 1.333355814642844e-3f;
    p = p * f + 9.618129107628477e-3f;
    p = p * f + 5.550410866482158e-2f;
    p = p * f + 2.402265069591007e-1f;
    p = p * f + 6.931471805599453e-1f;
    p = p * f + 1.0f;
    const IntVec exponent = ((IntVec)shifted - 0x4B400000 + 127) << 23;
    return p * (Vec)exponent;
}

// log(1 + e) for 0 <= e <= 1, accurate relative to the result also where e is tiny: 2 atanh(e / (2 + e)).
inline Vec log1p_unit(Vec e) {
    const Vec s = e / (e + 2.0f);
    const Vec z = s * s;
    Vec p = splat(2.0f / 11);
    p = p * z + 2.0f / 9;
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    p = p * z + 2.0f;
    return p * s;
}

inline Vec exp_of_minus_abs(Vec x) { return exp2((x < 0.0f ? x : -x) * kLog2e); }

inline Vec softplus(Vec x) { return at_least(x, 0.0f) + log1p_unit(exp_of_minus_abs(x)); }

inline Vec sigmoid(Vec x) {
    const Vec e = exp_of_minus_abs(x);
    return (x < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
}

}  // namespace

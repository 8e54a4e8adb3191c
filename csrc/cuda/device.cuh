// What all kernels share: 16-bit and float loads, softplus in log2 units, a small tensor-core product, and the staging
// of a page of steps (routes, parameter rows) in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../scan.h"
#include "plan.h"

namespace vmamba::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr unsigned kFullWarp = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------------
// Numbers
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// Two neighbouring 16-bit numbers in a register.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

__device__ __forceinline__ uint32_t divide(uint32_t x, const Divisor& divisor) {
    return (__umulhi(x, divisor.multiplier) + static_cast<uint64_t>(x)) >> divisor.shift;
}

// base + a * b, in one instruction.
__device__ __forceinline__ const char* offset_by(const char* base, uint32_t a, uint32_t b) {
    uint64_t address;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(a), "r"(b), "l"(reinterpret_cast<uint64_t>(base)));
    return reinterpret_cast<const char*>(address);
}

__device__ __forceinline__ char* offset_by(char* base, uint32_t a, uint32_t b) {
    return const_cast<char*>(offset_by(static_cast<const char*>(base), a, b));
}

// A store to an address that offset_by hides from the compiler: as a generic one it would wait for, and hold up,
// accesses of shared memory.
template <typename T>
__device__ __forceinline__ void store_global(char* to, T x) {
    if constexpr (sizeof(T) == 2) {
        asm volatile("st.global.b16 [%0], %1;" ::"l"(to), "h"(*reinterpret_cast<const uint16_t*>(&x)));
    } else {
        asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(*reinterpret_cast<const uint32_t*>(&x)));
    }
}

// A load or store whose element type is known at run time only; the branch is the same for a whole grid.
__device__ __forceinline__ float load_as(const void* data, int64_t index, Scalar type) {
    if (type == Scalar::f32) return static_cast<const float*>(data)[index];
    if (type == Scalar::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    return to_float(static_cast<const __half*>(data)[index]);
}

__device__ __forceinline__ void store_as(void* data, int64_t index, float x, Scalar type) {
    if (type == Scalar::f32) {
        static_cast<float*>(data)[index] = x;
    } else if (type == Scalar::bf16) {
        static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
    } else {
        static_cast<__half*>(data)[index] = from_float<__half>(x);
    }
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(1 + e) for e in [0, 1]: to a relative error of 2e-7 also where e is tiny (Exact), or to an absolute one of
// 2^-22, far below what rounding the inputs to 16 bits makes of a step.
template <bool Exact>
__device__ __forceinline__ float log2_1p(float e) {
    if constexpr (!Exact) return log2_fast(1.f + e);
    float p = 0.0075491657f;
    p = fmaf(p, e, -0.042566996f);
    p = fmaf(p, e, 0.11285609f);
    p = fmaf(p, e, -0.19711888f);
    p = fmaf(p, e, 0.27564138f);
    p = fmaf(p, e, -0.35840845f);
    p = fmaf(p, e, 0.48069295f);
    p = fmaf(p, e, -0.7213402f);
    p = fmaf(p, e, 1.442695f);
    return p * e;
}

// From a raw step to a step in log2 units: x = (raw + bias) / ln 2, then log2(1 + 2^x) where softplus is asked for.
// Whether it is, is two numbers rather than a branch, so that the steps of an unrolled loop overlap.
template <bool Exact>
struct Stepper {
    float bias = 0.f;           // / ln 2
    float floor = 0.f;          // -inf without softplus
    float with_softplus = 1.f;  // 0 without

    __device__ Stepper(const Param& dt_bias, int direction, int64_t channel, bool softplus) {
        if (dt_bias.data) bias = dt_bias.data[direction * dt_bias.direction_stride + channel] * kLog2e;
        if (!softplus) floor = -INFINITY, with_softplus = 0.f;
    }
    __device__ __forceinline__ float step(float raw) const {
        const float x = fmaf(raw, kLog2e, bias);
        const float e = exp2_fast(-fabsf(x)) * with_softplus;
        return log2_1p<Exact>(e) + fmaxf(x, floor);
    }
    // d step / d raw, from the step: 1 - exp(-softplus(x)) with softplus, else 1.
    __device__ __forceinline__ float slope(float step) const {
        float slope = 1.f - exp2_fast(-step);  // infinite for a step far below zero, as there may be without softplus
        if constexpr (Exact) {
            const float v = step * kLn2;
            const float series = v * fmaf(v, fmaf(v, fmaf(v, -1.f / 24.f, 1.f / 6.f), -0.5f), 1.f);
            if (v < 0.08f) slope = series;
        }
        return with_softplus != 0.f ? slope : 1.f;
    }
    // The same over ln 2.
    __device__ __forceinline__ float slope_per_ln2(float step) const {
        if constexpr (Exact) return slope(step) * kLog2e;
        // The absolute value changes no step behind a softplus, and keeps others from infinity, which zero does not
        // cancel.
        return fmaf(-kLog2e * with_softplus, exp2_fast(-fabsf(step)), kLog2e);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores: 16x8 += 16x8 * 8x8 in tf32. Exact adds the two cross products of a split into high and low parts.
// Lane g * 4 + q holds a = {(g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4)}, b = {(q, g), (q + 4, g)} and
// acc = {(g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1)}.
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounded operands are in tf32 already: 16-bit numbers, and weights that were rounded when they were staged.
template <bool Exact, bool RoundedA, bool RoundedB>
__device__ __forceinline__ void mma(float (&acc)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t a_high[4], b_high[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) a_high[i] = RoundedA ? __float_as_uint(a[i]) : to_tf32(a[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) b_high[i] = RoundedB ? __float_as_uint(b[i]) : to_tf32(b[i]);
    if constexpr (Exact) {
        uint32_t a_low[4], b_low[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) a_low[i] = to_tf32(a[i] - __uint_as_float(a_high[i]));
#pragma unroll
        for (int i = 0; i < 2; ++i) b_low[i] = to_tf32(b[i] - __uint_as_float(b_high[i]));
        mma_tf32(acc, a_low, b_high);
        mma_tf32(acc, a_high, b_low);
    }
    mma_tf32(acc, a_high, b_high);
}

// 16x8 += 16x16 * 16x8 in bfloat16. Lane g * 4 + q holds, as pairs of columns 2q and 2q + 1 of a and of rows of b,
// a = {row g, row g + 8, row g with columns + 8, row g + 8 with columns + 8} and b = {column g, the same with rows +
// 8}.
__device__ __forceinline__ void mma_bf16(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with 8 columns of a and 8 rows of b: a = {row g, row g + 8}, b = column g.
__device__ __forceinline__ void mma_bf16(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// 16x8 += 16x16 * 16x8 in T, bfloat16 or float16, with lanes as for bfloat16 above.
template <typename T>
__device__ __forceinline__ void mma_16bit(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        mma_bf16(acc, a[0], a[1], a[2], a[3], b0, b1);
    }
}

// The sum over the four lanes that share a row of a product.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// The transpose of an 8x8 matrix of 16-bit numbers, of which lane g * 4 + q holds row g, columns 2q and 2q + 1.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// A page in shared memory
// ---------------------------------------------------------------------------------------------------------------------

// One block's place in the grid: channel tiles vary fastest, so that blocks that share rows run together.
struct Place {
    int tile;
    int64_t chunk;
    int slice;  // direction * groups + group
    int64_t image;
};

__device__ __forceinline__ Place place_of_block(int tiles, int64_t chunks, int slices) {
    int64_t i = blockIdx.x;
    Place p;
    p.tile = static_cast<int>(i % tiles);
    i /= tiles;
    p.slice = static_cast<int>(i % slices);
    i /= slices;
    p.chunk = i % chunks;
    p.image = i / chunks;
    return p;
}

// A table entry that is safe to read at: -1 stands for every entry outside the map.
__device__ __forceinline__ int position(const int32_t* table, int64_t t, int64_t length) {
    const int p = table[t];
    return static_cast<uint32_t>(p) < static_cast<uint64_t>(length) ? p : -1;
}

// A column of an activation: one feature at every position of an (image, direction). Positions and strides multiply to
// 64 bits in one instruction; check_supported sees to it that the stride fits.
template <typename T>
struct Column {
    const char* data;
    uint32_t stride;  // bytes
    __device__ Column(const Rows& rows, int64_t image, int direction, int64_t feature)
        : data(reinterpret_cast<const char*>(static_cast<const T*>(rows.data) + image * rows.image_stride +
                                             direction * rows.direction_stride + feature)),
          stride(static_cast<uint32_t>(rows.position_stride * sizeof(T))) {}
    __device__ __forceinline__ T at(int position) const {
        return __ldg(reinterpret_cast<const T*>(offset_by(data, position, stride)));
    }
    // Zero where nothing is read. Kept as T: a conversion here would wait for the load.
    __device__ __forceinline__ T at_or_zero(int position) const {
        T value = from_float<T>(0.f);
        if (position >= 0) value = at(position);
        return value;
    }
};

// Byte offset of a position in the merged result of 16 channels (fused.cuh). The exclusive-or spreads the positions
// that the four lanes of a channel pair touch together, which lie 16 (small) or 8 rows or columns apart, over the
// banks. Of all multipliers these leave the fewest conflicts on maps from 7x7 to 96x96: 2.5 wavefronts a warp, of two
// at least.
__device__ __forceinline__ uint32_t merged_offset(uint32_t position, bool small) {
    const uint32_t pair = position >> 1, spread = small ? pair * 705 >> 9 : pair * 17 >> 6;
    return position * 64 ^ (spread & 3) << 5;
}

// The tables of one (image, direction).
struct Walk {
    const int32_t* route;
    const int32_t* param_route;
    const uint8_t* reset;
    int64_t length;
    __device__ Walk(const Scan& s, int64_t image, int direction)
        : route(s.route.data + image * s.route.image_stride + direction * s.route.direction_stride),
          param_route(s.param_route.data + image * s.param_route.image_stride +
                      direction * s.param_route.direction_stride),
          reset(s.reset.data ? s.reset.data + image * s.reset.image_stride + direction * s.reset.direction_stride
                             : nullptr),
          length(s.length) {}
};

// Shared-memory arrays of a page. low: low-rank steps, a row of Low a step; gains: (64, 2 * Group) rows of B then C.
template <typename Low = float>
struct PageStore {
    int* at;      // position of u and of the result, -1 for none
    int* row_at;  // position of dt, B and C
    float* drop;  // added to the decay's exponent: -inf where the state is reset before the step, else 0
    Low* low;
    float* gains;
};

// Reads the tables of a page, by the whole block.
template <typename Low>
__device__ void stage_positions(const PageStore<Low>& page, const Walk& walk, int64_t begin, int count) {
    for (int t = threadIdx.x; t < kPageSteps; t += blockDim.x) {
        page.at[t] = t < count ? position(walk.route, begin + t, walk.length) : -1;
        page.row_at[t] = t < count ? position(walk.param_route, begin + t, walk.length) : -1;
        page.drop[t] = walk.reset && t < count && walk.reset[begin + t] ? -INFINITY : 0.f;
    }
}

// Reads the rows of a page whose positions are staged: low-rank steps, B (times b_scale) and C as floats, zero where
// nothing is read. C is also zero where the result is not written, which makes that result zero. Columns of `low`
// behind the rank are cleared once, by clear_low. Low: float or T, in rows of low_stride.
template <typename T, int Group, typename Low>
__device__ void stage_rows(const PageStore<Low>& page, int low_stride, const Scan& s, int64_t image, int direction,
                           int first_state, float b_scale = 1.f) {
    constexpr int kLanes = Group == 1 ? 8 : 16;  // threads along a row
    constexpr int kBatch = Group == 1 ? 8 : 4;   // rows whose loads are in flight together
    const int rank = static_cast<int>(s.rank), features = rank + 2 * Group;
    const int states = min(Group, static_cast<int>(s.states) - first_state);
    const int rows = blockDim.x / kLanes;
    for (int t = threadIdx.x / kLanes; t < kPageSteps; t += rows * kBatch) {
        int read_at[kBatch], unwritten[kBatch];  // -1: not read, not written
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int row = min(t + i * rows, kPageSteps - 1);
            read_at[i] = page.row_at[row];
            unwritten[i] = page.at[row] >> 31;
        }
        for (int f = threadIdx.x % kLanes; f < features; f += kLanes) {
            const bool of_dt = f < rank, of_c = f >= rank + Group;
            const int state = f - rank - (of_c ? Group : 0);
            const Rows& source = of_dt ? s.dt : of_c && s.C.data ? s.C : s.B;
            const bool there = of_dt || (state < states && (!of_c || s.C.data));
            const Column<T> column(source, image, direction, of_dt ? f : there ? first_state + state : 0);
            const int absent = there ? 0 : -1, of_result = of_c ? -1 : 0;
            T value[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                value[i] = column.at_or_zero(read_at[i] | absent | (unwritten[i] & of_result));
            if (of_dt) {
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    Low* to = page.low + (t + i * rows) * low_stride + f;
                    if (t + i * rows >= kPageSteps) continue;
                    if constexpr (std::is_same_v<Low, T>) {
                        *to = value[i];
                    } else {
                        *to = to_float(value[i]);
                    }
                }
                continue;
            }
            const float scale = of_c ? 1.f : b_scale;
            float* to = page.gains + (of_c ? Group : 0) + state + t * 2 * Group;
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (t + i * rows < kPageSteps) to[i * rows * 2 * Group] = to_float(value[i]) * scale;
        }
    }
}

template <typename Low>
__device__ void clear_low(Low* low, int low_stride) {
    for (int i = threadIdx.x; i < kPageSteps * low_stride; i += blockDim.x) low[i] = from_float<Low>(0.f);
}

// Consecutive floats of shared memory, four at a time where their number allows (their start is then aligned).
template <int Count>
__device__ __forceinline__ void load_floats(float (&x)[Count], const float* from) {
    if constexpr (Count % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Count; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(from + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < Count; ++i) x[i] = from[i];
    }
}

// The weights that expand low-rank steps, (tile, rank_stride), zero outside; once per block. Rounded to tf32 unless
// Exact.
template <bool Exact>
__device__ inline void stage_weights(float* weights, const Scan& s, int direction, int first_channel, int tile) {
    const int rank = static_cast<int>(s.rank), stride = rank_stride(rank);
    const float* source = s.dt_weight.data + direction * s.dt_weight.direction_stride;
    constexpr int kLanes = 8;
    for (int c = threadIdx.x / kLanes; c < tile; c += blockDim.x / kLanes) {
        for (int r = threadIdx.x % kLanes; r < stride; r += kLanes) {
            const bool there = r < rank && first_channel + c < s.channels;
            const float weight = there ? source[static_cast<int64_t>(first_channel + c) * rank + r] : 0.f;
            weights[c * stride + r] = Exact ? weight : __uint_as_float(to_tf32(weight));
        }
    }
}

// Raw steps (before bias and softplus) of a page for `Width` channels of one warp, into delta (64, delta_stride): full
// ones, which are only read.
template <typename T, int Width>
__device__ void read_full_steps(float* delta, int stride, const int* row_at, const Scan& s, int64_t image,
                                int direction, int first_channel, int warp_channel, int count) {
    constexpr int kRows = 32 / Width, kBatch = 8;
    const int lane = threadIdx.x % 32, c = warp_channel + lane % Width, channel = first_channel + c;
    const Column<T> dt(s.dt, image, direction, min(static_cast<int64_t>(channel), s.channels - 1));
    for (int t = lane / Width; t < count; t += kRows * kBatch) {
        T value[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) value[i] = dt.at_or_zero(row_at[min(t + i * kRows, kPageSteps - 1)]);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (t + i * kRows < kPageSteps) delta[(t + i * kRows) * stride + c] = to_float(value[i]);
    }
}

// The same for full steps and for low-rank ones, which are a tensor-core product of the staged rows and weights.
template <typename T, int Width>
__device__ void expand_steps(float* delta, int stride, const PageStore<>& page, const float* weights, const Scan& s,
                             int64_t image, int direction, int first_channel, int warp_channel, int count) {
    const int lane = threadIdx.x % 32;
    if (s.rank == 0)
        return read_full_steps<T, Width>(delta, stride, page.row_at, s, image, direction, first_channel, warp_channel,
                                         count);
    constexpr bool kExact = std::is_same_v<T, float>;
    const int g = lane / 4, q = lane % 4, row_stride = rank_stride(static_cast<int>(s.rank));
    const int columns = rank_columns(static_cast<int>(s.rank));
    for (int t = 0; t < count; t += 16) {
        float acc[Width / 8][4] = {};
        for (int r = 0; r < columns; r += 8) {
            const float* row = page.low + (t + g) * row_stride + r + q;
            const float a[4] = {row[0], row[8 * row_stride], row[4], row[8 * row_stride + 4]};
#pragma unroll
            for (int n = 0; n < Width / 8; ++n) {
                const float* weight = weights + (warp_channel + n * 8 + g) * row_stride + r + q;
                const float b[2] = {weight[0], weight[4]};
                mma<kExact, !kExact, !kExact>(acc[n], a, b);
            }
        }
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) {
            float* out = delta + (t + g) * stride + warp_channel + n * 8 + 2 * q;
            *reinterpret_cast<float2*>(out) = make_float2(acc[n][0], acc[n][1]);
            *reinterpret_cast<float2*>(out + 8 * stride) = make_float2(acc[n][2], acc[n][3]);
        }
    }
}

}  // namespace vmamba::cuda

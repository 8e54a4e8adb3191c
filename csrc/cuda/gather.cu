// Everything that turns per-step, per-slice results into tensors: lists of which steps visit a position, sums along
// those lists, the fold of chunk summaries, and the reduction of parameter gradients. Every sum runs in a fixed order.
#include "device.cuh"
#include "kernels.h"

namespace vmamba::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t global_thread() {
    return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

int64_t blocks_for(int64_t threads) { return ceil_div(threads, kThreads); }

// ---------------------------------------------------------------------------------------------------------------------
// Lists of visits
// ---------------------------------------------------------------------------------------------------------------------

struct ListArgs {
    Table<int32_t> table;
    Visits visits;
    int64_t tables, directions, steps, length;
};

// Links each step in front of its position's list, in whatever order threads arrive.
__global__ void link_visits(const ListArgs args) {
    const int64_t i = global_thread();
    if (i >= args.tables * args.steps) return;
    const int64_t table = i / args.steps, t = i % args.steps;
    const int32_t* route = args.table.data + table / args.directions * args.table.image_stride +
                           table % args.directions * args.table.direction_stride;
    const int p = position(route, t, args.length);
    if (p >= 0)
        args.visits.previous[i] = atomicExch(args.visits.last + table * args.length + p, static_cast<int32_t>(t));
}

// Orders each list from the last step to the first, so that sums do not depend on how threads arrived. Lists are short
// (one visit in nearly every route), so this is an insertion sort.
__global__ void order_visits(const ListArgs args) {
    const int64_t i = global_thread();
    if (i >= args.tables * args.length) return;
    int32_t* previous = args.visits.previous + i / args.length * args.steps;
    int32_t node = args.visits.last[i];
    if (node < 0 || previous[node] < 0) return;
    int32_t first = -1;
    while (node >= 0) {
        const int32_t next = previous[node];
        if (first < node) {
            previous[node] = first;
            first = node;
        } else {
            int32_t after = first;
            while (previous[after] > node) after = previous[after];
            previous[node] = previous[after];
            previous[after] = node;
        }
        node = next;
    }
    args.visits.last[i] = first;
}

// One block per direction, with a bit per position in shared memory to find revisits.
__global__ void prepare_route_kernel(Table<int32_t> table, int64_t steps, int64_t length, bool small,
                                     Prepared prepared) {
    extern __shared__ uint32_t visited[];
    for (int64_t i = threadIdx.x; i < (length + 31) / 32; i += blockDim.x) visited[i] = 0;
    __syncthreads();
    const int64_t base = blockIdx.x * prepared.padded;
    bool again = false, nowhere = false;
    for (int64_t t = threadIdx.x; t < prepared.padded; t += blockDim.x) {
        const int p = t < steps ? position(table.data + blockIdx.x * table.direction_stride, t, length) : kBehind;
        if (p >= 0) again |= atomicOr(visited + p / 32, 1u << (p % 32)) >> (p % 32) & 1;
        nowhere |= p == kNowhere;
        prepared.places[base + t] = static_cast<int16_t>(p);
        prepared.offsets[base + t] = static_cast<uint16_t>(merged_offset(max(p, 0), small) / 8);
    }
    again = __syncthreads_or(again);
    nowhere = __syncthreads_or(nowhere);
    if (threadIdx.x == 0) prepared.flags[blockIdx.x] = (again ? kRevisits : 0) | (nowhere ? kSomeNowhere : 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums along the lists
// ---------------------------------------------------------------------------------------------------------------------

template <typename T, int Width>
struct alignas(sizeof(T) * Width < 16 ? sizeof(T) * Width : 16) Pack {
    T value[Width];
};

// One thread: `Width` features of one position of one output. Blocks do not straddle outputs.
template <typename Source, typename Target, int Width>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArgs args) {
    constexpr int kTogether = 4;  // directions whose loads are in flight together
    const uint32_t blocks_each = static_cast<uint32_t>((args.length * args.packs.by + kThreads - 1) / kThreads);
    const uint32_t outer = blockIdx.x / blocks_each;
    const uint32_t i = (blockIdx.x - outer * blocks_each) * kThreads + threadIdx.x;
    const uint32_t l = divide(i, args.packs);
    if (l >= args.length) return;
    const int feature = static_cast<int>(i - l * args.packs.by) * Width;
    const int64_t image = outer / args.outputs;
    const int output = static_cast<int>(outer - image * args.outputs);
    const int first = args.outputs == 1 ? 0 : output;
    const int end = args.outputs == 1 ? args.directions : first + 1;
    float total[Width] = {};
    const auto add = [&](int k, int t) {
        for (int g = 0; g < args.groups; ++g) {
            const int64_t row = (image * args.directions + k) * args.groups + g;
            const Source* source =
                static_cast<const Source*>(args.source) + (row * args.source_steps + t) * args.features + feature;
            const auto pack = *reinterpret_cast<const Pack<Source, Width>*>(source);
#pragma unroll
            for (int f = 0; f < Width; ++f) total[f] += to_float(pack.value[f]);
        }
    };
    for (int k = first; k < end; k += kTogether) {
        // Nearly always one visit per direction: their loads are issued together, further visits follow.
        int visit[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int64_t table = args.visits.per_image ? image * args.directions + k + j : k + j;
            visit[j] = k + j < end ? args.visits.last[table * args.length + l] : -1;
        }
        int earlier[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int64_t table = args.visits.per_image ? image * args.directions + k + j : k + j;
            earlier[j] = visit[j] >= 0 ? args.visits.previous[table * args.steps + visit[j]] : -1;
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
            if (visit[j] >= 0) add(k + j, visit[j]);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int64_t table = args.visits.per_image ? image * args.directions + k + j : k + j;
            for (int t = earlier[j]; t >= 0; t = args.visits.previous[table * args.steps + t]) add(k + j, t);
        }
    }
    Pack<Target, Width> result;
#pragma unroll
    for (int f = 0; f < Width; ++f) result.value[f] = from_float<Target>(total[f]);
    Target* target = static_cast<Target*>(args.target) + image * args.image_stride + output * args.output_stride +
                     l * args.position_stride + feature;
    *reinterpret_cast<Pack<Target, Width>*>(target) = result;
}

template <typename Source, typename Target>
void gather_as(GatherArgs args, cudaStream_t stream) {
    const bool wide = args.features % 8 == 0 && args.image_stride % 8 == 0 && args.output_stride % 8 == 0 &&
                      args.position_stride % 8 == 0;
    args.packs = Divisor(static_cast<uint32_t>(wide ? args.features / 8 : args.features));
    const int64_t blocks = args.batch * args.outputs * blocks_for(args.length * args.packs.by);
    if (wide) {
        launch(gather_kernel<Source, Target, 8>, blocks, kThreads, 0, stream, args);
    } else {
        launch(gather_kernel<Source, Target, 1>, blocks, kThreads, 0, stream, args);
    }
}

template <typename Source>
void gather_from(const GatherArgs& args, cudaStream_t stream) {
    switch (args.target_dtype) {
        case Scalar::f32:
            return gather_as<Source, float>(args, stream);
        case Scalar::bf16:
            return gather_as<Source, __nv_bfloat16>(args, stream);
        default:
            return gather_as<Source, __half>(args, stream);
    }
}

__global__ void sum_groups_kernel(const float* source, int64_t rows, int groups, int64_t size, void* target,
                                  Scalar target_dtype) {
    const int64_t i = global_thread();
    if (i >= rows * size) return;
    const int64_t row = i / size, at = i % size;
    float total = 0.f;
    for (int g = 0; g < groups; ++g) total += source[(row * groups + g) * size + at];
    store_as(target, i, total, target_dtype);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of parameter rows and of parameters
// ---------------------------------------------------------------------------------------------------------------------

struct RowGatherArgs {
    BackwardArgs backward;
    Visits visits;
    Gradients gradients;
    int dt_outputs, b_outputs, c_outputs;  // K, or 1 where the directions share a tensor
    Divisor kinds, directions;
};

// One thread: one feature of one position of one direction, of several images where they share a table, whose lookups
// are most of the work. Features: R of the low-rank steps, then N of B, then N of C.
template <int Images>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const __grid_constant__ RowGatherArgs args) {
    const Scan& s = args.backward.scan;
    const Cut& cut = args.backward.cut;
    const int rank = static_cast<int>(s.rank), states = static_cast<int>(s.states), kinds = rank + 2 * states;
    const uint32_t per_image = static_cast<uint32_t>(s.length * s.directions * kinds);
    const uint32_t blocks_each = (per_image + kThreads - 1) / kThreads;
    const uint32_t group_of_images = blockIdx.x / blocks_each;
    const int64_t image = static_cast<int64_t>(group_of_images) * Images;
    const uint32_t i = (blockIdx.x - group_of_images * blocks_each) * kThreads + threadIdx.x;
    if (i >= per_image) return;
    const uint32_t cell = divide(i, args.kinds);
    int f = static_cast<int>(i - cell * args.kinds.by);
    const int64_t l = divide(cell, args.directions);
    const int k_out = static_cast<int>(cell - static_cast<uint32_t>(l) * args.directions.by);

    void* target;
    int outputs, size, first_group = 0, end_group = cut.groups, source_feature = f;
    if (f < rank) {
        target = args.gradients.dt, outputs = args.dt_outputs, size = rank;
    } else {
        f -= rank;
        const bool of_c = f >= states;
        f -= of_c ? states : 0;
        target = of_c ? args.gradients.C : args.gradients.B;
        outputs = of_c ? args.c_outputs : args.b_outputs, size = states;
        first_group = f / cut.group, end_group = first_group + 1;
        source_feature = rank + (of_c ? cut.group : 0) + f % cut.group;
    }
    if (!target || k_out >= outputs) return;
    const int64_t row_stride = args.gradients.row_stride ? args.gradients.row_stride : size;
    const int row_features = rank + 2 * cut.group;
    const int k_begin = outputs == 1 ? 0 : k_out, k_end = outputs == 1 ? static_cast<int>(s.directions) : k_out + 1;
    const int64_t image_rows = s.directions * cut.groups * cut.tiles * s.steps * row_features;
    float total[Images] = {};
    for (int k = k_begin; k < k_end; ++k) {
        const int64_t table = args.visits.per_image ? image * s.directions + k : k;
        const int32_t* previous = args.visits.previous + table * s.steps;
        for (int t = args.visits.last[table * s.length + l]; t >= 0; t = previous[t]) {
            for (int g = first_group; g < end_group; ++g) {
                const int64_t slice = (image * s.directions + k) * cut.groups + g;
                for (int tile = 0; tile < cut.tiles; ++tile) {
                    const float* from =
                        args.backward.rows + ((slice * cut.tiles + tile) * s.steps + t) * row_features + source_feature;
#pragma unroll
                    for (int j = 0; j < Images; ++j)
                        if (image + j < s.batch) total[j] += from[j * image_rows];
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < Images; ++j)
        if (image + j < s.batch)
            store_as(target, (((image + j) * s.length + l) * outputs + k_out) * row_stride + f, total[j], s.dtype);
}

// One block: 32 channels of one parameter row of one direction; its 8 rows of threads split the partial results.
__global__ void __launch_bounds__(kThreads) reduce_params_kernel(const __grid_constant__ RowGatherArgs args) {
    const Scan& s = args.backward.scan;
    const Cut& cut = args.backward.cut;
    const int rank = static_cast<int>(s.rank), states = static_cast<int>(s.states), kinds = states + 2 + rank;
    const int64_t channel_blocks = (s.channels + 31) / 32;
    int64_t i = blockIdx.x;
    const int64_t channel = i % channel_blocks * 32 + threadIdx.x % 32;
    i /= channel_blocks;
    int f = static_cast<int>(i % kinds);
    const int k_out = static_cast<int>(i / kinds);

    float* target;
    bool shared_by_directions;
    int64_t direction_size, at;
    int first_group = 0, end_group = cut.groups, source_row;
    if (f < states) {
        target = args.gradients.A, shared_by_directions = s.A.direction_stride == 0;
        direction_size = s.channels * states, at = channel * states + f;
        first_group = f / cut.group, end_group = first_group + 1, source_row = f % cut.group;
    } else if (f == states) {
        target = args.gradients.D, shared_by_directions = s.D.direction_stride == 0;
        direction_size = s.channels, at = channel;
        end_group = 1, source_row = cut.group;
    } else if (f == states + 1) {
        target = args.gradients.dt_bias, shared_by_directions = s.dt_bias.direction_stride == 0;
        direction_size = s.channels, at = channel;
        source_row = cut.group + 1;
    } else {
        const int r = f - states - 2;
        target = args.gradients.dt_weight, shared_by_directions = s.dt_weight.direction_stride == 0;
        direction_size = s.channels * rank, at = channel * rank + r;
        source_row = cut.group + 2 + r;
    }
    if (!target || (shared_by_directions && k_out > 0)) return;
    const int k_begin = shared_by_directions ? 0 : k_out;
    const int k_end = shared_by_directions ? static_cast<int>(s.directions) : k_out + 1;
    const int row_count = cut.group + 2 + rank;
    const int64_t parts = s.batch * cut.chunks;
    float total = 0.f;
    if (channel < s.channels) {
        const int64_t slices = s.directions * cut.groups, part_size = slices * row_count * s.channels;
        for (int k = k_begin; k < k_end; ++k) {
            for (int g = first_group; g < end_group; ++g) {
                const float* source =
                    args.backward.params + ((k * cut.groups + g) * row_count + source_row) * s.channels + channel;
#pragma unroll 8
                for (int64_t part = threadIdx.x / 32; part < parts; part += kThreads / 32)
                    total += source[part * part_size];
            }
        }
    }
    __shared__ float totals[kThreads];
    totals[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x >= 32 || channel >= s.channels) return;
    for (int w = 1; w < kThreads / 32; ++w) total += totals[w * 32 + threadIdx.x];
    target[k_out * direction_size + at] = total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Fold of chunk summaries
// ---------------------------------------------------------------------------------------------------------------------

__global__ void fold_kernel(float* carry, const float* decay, int64_t rows, int64_t chunks, int64_t size,
                            bool backwards) {
    const int64_t i = global_thread();
    if (i >= rows * size) return;
    const int64_t base = i / size * chunks * size + i % size;
    float state = 0.f;
    constexpr int kAhead = 8;
    for (int64_t c = 0; c < chunks; c += kAhead) {
        float end[kAhead], factor[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            if (c + j >= chunks) continue;
            const int64_t at = base + (backwards ? chunks - 1 - c - j : c + j) * size;
            end[j] = carry[at];
            factor[j] = decay[at];
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            if (c + j >= chunks) continue;
            carry[base + (backwards ? chunks - 1 - c - j : c + j) * size] = state;
            state = fmaf(factor[j], state, end[j]);
        }
    }
}

}  // namespace

void check(cudaError_t status);

void list_visits(const Scan& scan, const Table<int32_t>& table, const Visits& visits, cudaStream_t stream) {
    ListArgs args{table,           visits,     (visits.per_image ? scan.batch : 1) * scan.directions,
                  scan.directions, scan.steps, scan.length};
    if (args.tables * args.length == 0) return;
    check(cudaMemsetAsync(visits.last, 0xff, args.tables * args.length * sizeof(int32_t), stream));
    launch(link_visits, blocks_for(args.tables * args.steps), kThreads, 0, stream, args);
    launch(order_visits, blocks_for(args.tables * args.length), kThreads, 0, stream, args);
}

void prepare_route(const Scan& scan, const Prepared& prepared, cudaStream_t stream) {
    launch(prepare_route_kernel, scan.directions, 1024, ceil_div(scan.length, 32) * 4, stream, scan.route, scan.steps,
           scan.length, fused_small(scan.rank), prepared);
}

void gather(const GatherArgs& args, cudaStream_t stream) {
    switch (args.source_dtype) {
        case Scalar::f32:
            return gather_from<float>(args, stream);
        case Scalar::bf16:
            return gather_from<__nv_bfloat16>(args, stream);
        default:
            return gather_from<__half>(args, stream);
    }
}

void sum_groups(const float* source, int64_t rows, int groups, int64_t size, void* target, Scalar target_dtype,
                cudaStream_t stream) {
    launch(sum_groups_kernel, blocks_for(rows * size), kThreads, 0, stream, source, rows, groups, size, target,
           target_dtype);
}

namespace {
RowGatherArgs with_outputs(const BackwardArgs& args, const Visits& visits, const Gradients& gradients) {
    const auto outputs = [&](const Rows& rows) {
        return rows.direction_stride == 0 ? 1 : static_cast<int>(args.scan.directions);
    };
    return {args,
            visits,
            gradients,
            outputs(args.scan.dt),
            outputs(args.scan.B),
            outputs(args.scan.C),
            Divisor(static_cast<uint32_t>(args.scan.rank + 2 * args.scan.states)),
            Divisor(static_cast<uint32_t>(args.scan.directions))};
}
}  // namespace

void gather_rows(const BackwardArgs& args, const Visits& visits, const Gradients& gradients, cudaStream_t stream) {
    const Scan& s = args.scan;
    const int64_t blocks_each = blocks_for(s.length * s.directions * (s.rank + 2 * s.states));
    const auto run = [&](auto images) {
        constexpr int kImages = decltype(images)::value;
        launch(gather_rows_kernel<kImages>, ceil_div(s.batch, kImages) * blocks_each, kThreads, 0, stream,
               with_outputs(args, visits, gradients));
    };
    // Few images of many positions fill the GPU better one by one.
    if (visits.per_image || s.batch < 16) return run(std::integral_constant<int, 1>{});
    run(std::integral_constant<int, 4>{});
}

void reduce_params(const BackwardArgs& args, const Gradients& gradients, cudaStream_t stream) {
    const Scan& s = args.scan;
    const int64_t blocks = s.directions * (s.states + 2 + s.rank) * ceil_div(s.channels, 32);
    launch(reduce_params_kernel, blocks, kThreads, 0, stream, with_outputs(args, Visits{}, gradients));
}

void fold(float* carry, const float* decay, int64_t rows, int64_t chunks, int64_t size, bool backwards,
          cudaStream_t stream) {
    launch(fold_kernel, blocks_for(rows * size), kThreads, 0, stream, carry, decay, rows, chunks, size, backwards);
}

}  // namespace vmamba::cuda

// The host side: lays out the workspace and queues the passes of a forward or a backward.
//
//   forward:  (summary, fold, if the steps are cut in chunks)  output  (lists of visits, gather, if merged)
//   backward: (summary, fold)  output  lists of visits, gathers for u, dt, B and C; reduction for the parameters
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <vector>

#include "backward_wide_layout.cuh"
#include "kernels.h"
#include "scan_cuda.h"

namespace vmamba::cuda {

void check(cudaError_t status) {
    STD_TORCH_CHECK(status != cudaErrorNoKernelImageForDevice,
                    "vmamba was built without code for this GPU; reinstall from source with its compute capability in "
                    "TORCH_CUDA_ARCH_LIST: TORCH_CUDA_ARCH_LIST=9.0 pip install --no-build-isolation .");
    STD_CUDA_CHECK(status);
}

void check_for_earlier_failure() {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
}

cudaStream_t current_stream(int device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

namespace {

int64_t checkpoints_of(const Scan& scan) { return ceil_div(scan.steps, checkpoint_interval(scan.states)); }
int64_t rows_of(const Scan& scan, const Cut& cut) { return scan.batch * scan.directions * cut.groups; }
int64_t carry_size(const Scan& scan, const Cut& cut) {
    return cut.chunks > 1 ? rows_of(scan, cut) * cut.chunks * scan.channels * cut.group : 0;
}

// A backward of one state writes whole spans of du, without a look at where the steps end.
int64_t du_steps_of(const Scan& scan) { return scan.states == 1 ? round_up(scan.steps, kSpan) : scan.steps; }

Visits take_visits(Arena& arena, const Scan& scan, const Table<int32_t>& table) {
    const bool per_image = table.image_stride != 0;
    const int64_t tables = (per_image ? scan.batch : 1) * scan.directions;
    return {arena.take<int32_t>(tables * scan.length), arena.take<int32_t>(tables * scan.steps), per_image};
}

int64_t size_of(Scalar type) { return type == Scalar::f32 ? 4 : 2; }

// Rows of single directions are rounded to bfloat16 before they are added up in float32, if the inputs are bfloat16;
// float16 could overflow there and keeps float32.
Scalar partial_dtype(const Scan& scan, const Cut& cut) {
    return scan.dtype == Scalar::bf16 && cut.groups == 1 ? Scalar::bf16 : Scalar::f32;
}

void check_supported(const Scan& scan, Scalar result_dtype) {
    STD_TORCH_CHECK(
        scan.length < std::numeric_limits<int32_t>::max() && scan.steps < std::numeric_limits<int32_t>::max(),
        "selective_scan on CUDA takes maps and routes of less than 2^31 entries");
    STD_TORCH_CHECK(scan.checkpoint_steps == 0 || scan.checkpoint_steps == checkpoint_interval(scan.states),
                    "selective_scan on CUDA keeps a checkpoint every ", checkpoint_interval(scan.states),
                    " steps, not every ", scan.checkpoint_steps);
    for (const Rows* rows : {&scan.u, &scan.dt, &scan.B, &scan.C})
        STD_TORCH_CHECK(rows->position_stride >= 0 && rows->position_stride < (int64_t{1} << 30),
                        "selective_scan on CUDA takes rows less than 2^30 elements apart");
    STD_TORCH_CHECK(result_dtype == Scalar::f32 || result_dtype == scan.dtype,
                    "selective_scan on CUDA returns float32 or the dtype of u");
    STD_TORCH_CHECK(scan.length > 0 || scan.steps == 0, "selective_scan on CUDA needs a map of at least one position");
    STD_TORCH_CHECK(scan.channels > 0 && scan.states > 0, "selective_scan on CUDA needs channels and states");
    STD_TORCH_CHECK(scan.rank <= kMostRank, "selective_scan on CUDA takes a dt rank up to ", kMostRank, ", got ",
                    scan.rank);
    constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
    STD_TORCH_CHECK(scan.length <= kMost / (scan.channels % 8 == 0 ? scan.channels / 8 : scan.channels) &&
                        scan.length <= kMost / (scan.directions * (scan.rank + 2 * scan.states)),
                    "selective_scan on CUDA takes no map as large as ", scan.length, " positions of ", scan.channels,
                    " channels");
}

// The most shared memory a block can have on a device; asked once for all devices.
int64_t shared_memory_limit(int device) {
    static const std::vector<int64_t> limits = [] {
        int devices = 0;
        check(cudaGetDeviceCount(&devices));
        std::vector<int64_t> found;
        for (int i = 0; i < devices; ++i) {
            int bytes = 0;
            check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, i));
            found.push_back(bytes);
        }
        return found;
    }();
    return limits.at(device);
}

Cut cut_of_backward(const Scan& scan, int64_t limit) {
    const int rank = static_cast<int>(scan.rank);
    const bool large = BackwardWideShared<kWideTile>(rank).bytes <= limit;
    STD_TORCH_CHECK(scan.states == 1 || large || BackwardWideShared<kSmallWideTile>(rank).bytes <= limit,
                    "the gradient of a selective scan of several states takes a smaller dt rank than ", rank,
                    " on this GPU, whose blocks have ", limit, " bytes of shared memory");
    return backward_cut(scan, limit, large ? kWideTile : kSmallWideTile);
}

struct ForwardMemory {
    Prepared prepared;
    float *carry, *decay;
    void* partial;  // results per slice and step, where they are not the result themselves
    Visits visits;
    int64_t bytes;
    ForwardMemory(const Scan& scan, const Cut& cut, bool fused, void* base) {
        Arena arena(base);
        if (fused) {
            prepared.padded = fused_padded_steps(scan);
            prepared.places = arena.take<int16_t>(scan.directions * prepared.padded);
            prepared.offsets = arena.take<uint16_t>(scan.directions * prepared.padded);
            prepared.flags = arena.take<int32_t>(scan.directions);
            prepared.weights = arena.take<uint4>(scan.directions * (scan.channels / 16) *
                                                 std::max(1, 2 * fused_blocks(scan.rank)) * 32);
            bytes = arena.used();
            return;
        }
        carry = arena.take<float>(carry_size(scan, cut));
        decay = arena.take<float>(carry_size(scan, cut));
        const bool merged = scan.result == Result::merged;
        const bool separate = merged || (scan.result == Result::steps && cut.groups > 1);
        const int64_t results = separate ? rows_of(scan, cut) * scan.steps * scan.channels : 0;
        partial = arena.take<char>(results * size_of(partial_dtype(scan, cut)));
        if (merged) visits = take_visits(arena, scan, scan.route);
        bytes = arena.used();
    }
};

struct BackwardMemory {
    float *carry, *decay, *rows, *params;
    void *du, *ddt;
    Visits visits, param_visits;
    int64_t bytes;
    BackwardMemory(const Scan& scan, const Cut& cut, void* base) {
        Arena arena(base);
        carry = arena.take<float>(carry_size(scan, cut));
        decay = arena.take<float>(carry_size(scan, cut));
        const int64_t cells = rows_of(scan, cut) * scan.steps;
        rows = arena.take<float>(cells * cut.tiles * (scan.rank + 2 * cut.group));
        params = arena.take<float>(rows_of(scan, cut) * cut.chunks * (cut.group + 2 + scan.rank) * scan.channels);
        const int64_t bytes_each = cut.groups == 1 ? size_of(scan.dtype) : 4;
        du = arena.take<char>(rows_of(scan, cut) * du_steps_of(scan) * scan.channels * bytes_each);
        ddt = arena.take<char>(scan.rank ? 0 : cells * scan.channels * bytes_each);
        visits = take_visits(arena, scan, scan.route);
        param_visits = scan.param_route.data == scan.route.data ? visits : take_visits(arena, scan, scan.param_route);
        bytes = arena.used();
    }
};

void run_forward(const ForwardArgs& args, Pass pass, bool float_out, cudaStream_t stream) {
    if (args.cut.lanes == kLongLanes) {
        const bool of_bf16 = args.scan.dtype == Scalar::bf16;
        return (of_bf16 ? long_forward<__nv_bfloat16> : long_forward<__half>)(args, float_out, stream);
    }
    switch (args.scan.dtype) {
        case Scalar::f32:
            return forward_pass<float>(args, pass, float_out, stream);
        case Scalar::bf16:
            return forward_pass<__nv_bfloat16>(args, pass, float_out, stream);
        default:
            return forward_pass<__half>(args, pass, float_out, stream);
    }
}

template <typename T>
void run_backward_as(const BackwardArgs& args, Pass pass, cudaStream_t stream) {
    if (args.scan.states == 1) return backward_pass<T>(args, pass, stream);
    backward_wide_pass<T>(args, pass, stream);
}

void run_backward(const BackwardArgs& args, Pass pass, cudaStream_t stream) {
    switch (args.scan.dtype) {
        case Scalar::f32:
            return run_backward_as<float>(args, pass, stream);
        case Scalar::bf16:
            return run_backward_as<__nv_bfloat16>(args, pass, stream);
        default:
            return run_backward_as<__half>(args, pass, stream);
    }
}

// Gathers per-step rows (batch, slice, source_steps, D) into a contiguous (batch, K or none, L, D) or (batch, L, K or
// 1, D).
void gather_channels(const Scan& scan, const Cut& cut, const Visits& visits, const void* source, int64_t source_steps,
                     Scalar source_dtype, void* target, Scalar target_dtype, int outputs, bool outputs_before_positions,
                     cudaStream_t stream) {
    GatherArgs args;
    args.visits = visits;
    args.source = source;
    args.source_steps = source_steps;
    args.source_dtype = source_dtype;
    args.target = target;
    args.target_dtype = target_dtype;
    args.batch = scan.batch;
    args.length = scan.length;
    args.steps = scan.steps;
    args.features = scan.channels;
    args.directions = static_cast<int>(scan.directions);
    args.groups = cut.groups;
    args.outputs = outputs;
    args.image_stride = outputs * scan.length * scan.channels;
    args.output_stride = outputs_before_positions ? scan.length * scan.channels : scan.channels;
    args.position_stride = outputs_before_positions ? scan.channels : outputs * scan.channels;
    gather(args, stream);
}

}  // namespace

int64_t forward_workspace(const Scan& scan, int device) {
    const int64_t limit = shared_memory_limit(device);
    return ForwardMemory(scan, forward_cut(scan, limit), fused_takes(scan, limit), nullptr).bytes;
}

void forward(const Scan& scan, void* out, Scalar out_dtype, float* checkpoints, void* workspace, int device) {
    check_supported(scan, out_dtype);
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    const int64_t limit = shared_memory_limit(device);
    const Cut cut = forward_cut(scan, limit);
    const bool fused = fused_takes(scan, limit);
    const ForwardMemory memory(scan, cut, fused, workspace);
    if (fused) {
        FusedArgs args;
        args.scan = scan;
        args.out = out;
        args.checkpoints = scan.checkpoint_steps ? checkpoints : nullptr;
        args.checkpoint_count = checkpoints_of(scan);
        args.prepared = memory.prepared;
        prepare_route(scan, memory.prepared, stream);
        const bool float_out = out_dtype == Scalar::f32;
        if (scan.dtype == Scalar::bf16) return fused_forward<__nv_bfloat16>(args, float_out, stream);
        return fused_forward<__half>(args, float_out, stream);
    }
    const bool merged = scan.result == Result::merged;
    const Scalar partial = partial_dtype(scan, cut);
    const bool separate = merged || (scan.result == Result::steps && cut.groups > 1);

    ForwardArgs args;
    args.scan = scan;
    args.cut = cut;
    args.checkpoint_count = checkpoints_of(scan);
    args.out = separate ? memory.partial : out;
    args.checkpoints = scan.checkpoint_steps ? checkpoints : nullptr;
    if (cut.chunks > 1) {
        args.carry_out = memory.carry;
        args.decay = memory.decay;
        run_forward(args, Pass::summary, true, stream);
        fold(memory.carry, memory.decay, rows_of(scan, cut), cut.chunks, scan.channels * cut.group, false, stream);
        args.carry = memory.carry;
    }
    run_forward(args, Pass::output, (separate ? partial : out_dtype) == Scalar::f32, stream);
    if (merged) {
        list_visits(scan, scan.route, memory.visits, stream);
        gather_channels(scan, cut, memory.visits, memory.partial, scan.steps, partial, out, out_dtype, 1, true, stream);
    } else if (separate) {
        sum_groups(static_cast<const float*>(memory.partial), scan.batch * scan.directions, cut.groups,
                   scan.steps * scan.channels, out, out_dtype, stream);
    }
}

int64_t backward_workspace(const Scan& scan, int device) {
    return BackwardMemory(scan, cut_of_backward(scan, shared_memory_limit(device)), nullptr).bytes;
}

void backward(const Scan& scan, const void* grad, Scalar grad_dtype, const float* checkpoints,
              const Gradients& gradients, void* workspace, int device) {
    check_supported(scan, grad_dtype);
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    const Cut cut = cut_of_backward(scan, shared_memory_limit(device));
    const BackwardMemory memory(scan, cut, workspace);

    BackwardArgs args;
    args.scan = scan;
    args.cut = cut;
    args.checkpoint_count = checkpoints_of(scan);
    args.grad = grad;
    args.grad_dtype = grad_dtype;
    args.checkpoints = checkpoints;
    args.rows_in_pairs = rows_in_pairs(scan);
    args.du_steps = du_steps_of(scan);
    args.du = memory.du;
    args.ddt = memory.ddt;
    args.rows = memory.rows;
    args.params = memory.params;
    if (cut.chunks > 1) {
        args.carry_out = memory.carry;
        args.decay = memory.decay;
        run_backward(args, Pass::summary, stream);
        fold(memory.carry, memory.decay, rows_of(scan, cut), cut.chunks, scan.channels * cut.group, true, stream);
        args.carry = memory.carry;
    }
    run_backward(args, Pass::output, stream);

    list_visits(scan, scan.route, memory.visits, stream);
    if (scan.param_route.data != scan.route.data) list_visits(scan, scan.param_route, memory.param_visits, stream);
    const Scalar partial = cut.groups == 1 ? scan.dtype : Scalar::f32;
    const int directions = static_cast<int>(scan.directions);
    gather_channels(scan, cut, memory.visits, memory.du, args.du_steps, partial, gradients.u, scan.dtype,
                    scan.u.direction_stride == 0 ? 1 : directions, true, stream);
    if (scan.rank == 0)
        gather_channels(scan, cut, memory.param_visits, memory.ddt, scan.steps, partial, gradients.dt, scan.dtype,
                        scan.dt.direction_stride == 0 ? 1 : directions, false, stream);
    gather_rows(args, memory.param_visits, gradients, stream);
    reduce_params(args, gradients, stream);
}

}  // namespace vmamba::cuda

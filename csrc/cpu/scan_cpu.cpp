// The driver of the CPU kernels: picks the instruction set, turns 16-bit inputs into float32, splits the work into
// (image, block of channels) tasks, and adds up, in a fixed order, what tasks share. Nothing here depends on the number
// of threads, so results are the same for any.
#include "scan_cpu.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "blocks.h"

namespace vmamba::cpu {

int64_t forward_memory(const Scan& scan, int width) {
    return (kMaxTileSteps + 2 * scan.states + scan.rank) * int64_t(width);
}

int64_t backward_memory(const Scan& scan, int width) {
    const int64_t padded_rank = (scan.rank + width - 1) / width * width;
    const int64_t rows = scan.checkpoint_steps * (4 + scan.states) + 4 * scan.states + 2 * scan.rank + padded_rank;
    return rows * width;
}

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

// The widest instruction set this processor has; VMAMBA_CPU_ISA names a narrower one (for tests and comparisons).
const BlockKernels& choose_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
    const char* named = std::getenv("VMAMBA_CPU_ISA");
    const std::string wanted = named ? named : "";
    STD_TORCH_CHECK(wanted.empty() || wanted == "avx512" || wanted == "avx2" || wanted == "baseline",
                    "VMAMBA_CPU_ISA must be avx512, avx2 or baseline, got ", wanted);
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && (wanted.empty() || wanted == "avx512")) return avx512_kernels();
    if (has_avx2 && wanted != "baseline") return avx2_kernels();
#endif
    return baseline_kernels();
}

const BlockKernels& best_kernels() {
    static const BlockKernels& best = choose_kernels();
    return best;
}

// Wide blocks save work per step; narrow ones give small problems enough tasks for every thread of a desktop machine.
struct Split {
    int vectors, width;
    int64_t blocks;

    explicit Split(const Scan& scan) {
        const int lanes = best_kernels().lanes;
        vectors = scan.batch * scan.channels >= 16 * lanes ? 2 : 1;
        width = vectors * lanes;
        blocks = (scan.channels + width - 1) / width;
    }
    int64_t channel(int64_t block) const { return block * width; }
    int count(const Scan& scan, int64_t block) const {
        return int(std::min<int64_t>(width, scan.channels - channel(block)));
    }
};

using Floats = std::unique_ptr<float[]>;

Floats uninitialised(int64_t count) { return Floats(new float[std::max<int64_t>(count, 1)]); }

Floats zeros(int64_t count) { return std::make_unique<float[]>(std::max<int64_t>(count, 1)); }

constexpr int64_t kGrain = 1 << 14;  // elements per thread below which splitting a copy does not pay

template <typename T>
void to_float(const T* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename T>
void from_float(const float* from, void* to, int64_t count) {
    parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) static_cast<T*>(to)[i] = static_cast<T>(from[i]);
    });
}

void store_as(Scalar dtype, const float* from, void* to, int64_t count) {
    switch (dtype) {
        case Scalar::f32:
            if (from != to) std::memcpy(to, from, count * sizeof(float));
            return;
        case Scalar::bf16:
            return from_float<BFloat16>(from, to, count);
        case Scalar::f16:
            return from_float<Half>(from, to, count);
    }
}

void load_from(Scalar dtype, const void* from, int64_t offset, float* to, int64_t count) {
    if (dtype == Scalar::bf16) return to_float(static_cast<const BFloat16*>(from) + offset, to, count);
    if (dtype == Scalar::f16) return to_float(static_cast<const Half*>(from) + offset, to, count);
    to_float(static_cast<const float*>(from) + offset, to, count);
}

// A float32 copy of 16-bit rows; float32 rows are left where they are.
class FloatRows {
  public:
    FloatRows(const Scan& scan, const Rows& rows, int64_t features) : rows_(rows) {
        if (scan.dtype == Scalar::f32 || !rows.data) return;
        const int64_t directions = rows.direction_stride == 0 ? 1 : scan.directions;
        memory_ = uninitialised(scan.batch * directions * scan.length * features);
        const int64_t planes = scan.batch * directions;
        parallel_for(0, planes * scan.length, std::max<int64_t>(kGrain / std::max<int64_t>(features, 1), 1),
                     [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                             const int64_t plane = i / scan.length, position = i % scan.length;
                             const int64_t offset = plane / directions * rows.image_stride +
                                                    plane % directions * rows.direction_stride +
                                                    position * rows.position_stride;
                             load_from(scan.dtype, rows.data, offset, memory_.get() + i * features, features);
                         }
                     });
        rows_ = {memory_.get(), directions * scan.length * features, directions == 1 ? 0 : scan.length * features,
                 features};
    }
    const Rows& rows() const { return rows_; }

  private:
    Rows rows_;
    Floats memory_;
};

// The scan with float32 rows, and the memory that holds them where they had to be converted.
class FloatScan {
  public:
    explicit FloatScan(const Scan& scan)
        : u_(scan, scan.u, scan.channels),
          dt_(scan, scan.dt, scan.rank > 0 ? scan.rank : scan.channels),
          B_(scan, scan.B, scan.states),
          C_(scan, scan.C, scan.states),
          scan_(scan) {
        scan_.u = u_.rows();
        scan_.dt = dt_.rows();
        scan_.B = B_.rows();
        scan_.C = C_.rows();
        scan_.dtype = Scalar::f32;
    }
    const Scan& operator*() const { return scan_; }

  private:
    FloatRows u_, dt_, B_, C_;
    Scan scan_;
};

void check_routes(const Scan& scan) {
    const auto check = [&](const Table<int32_t>& table, const char* name) {
        const int64_t images = table.image_stride == 0 ? std::min<int64_t>(scan.batch, 1) : scan.batch;
        const int64_t entries = images * scan.directions * scan.steps;
        int32_t highest = -1;
        for (int64_t i = 0; i < entries; ++i) highest = std::max(highest, table.data[i]);
        STD_TORCH_CHECK(highest < scan.length, name, " visits position ", highest, " of a map with ", scan.length,
                        " positions");
    };
    check(scan.route, "route");
    if (scan.param_route.data != scan.route.data) check(scan.param_route, "param_route");
    STD_TORCH_CHECK(scan.checkpoint_steps % kMaxTileSteps == 0, "checkpoint_steps must be a multiple of ",
                    kMaxTileSteps, ", got ", scan.checkpoint_steps);
}

int64_t result_size(const Scan& scan) {
    if (scan.result == Result::merged) return scan.batch * scan.length * scan.channels;
    const int64_t steps = scan.batch * scan.directions * scan.steps * scan.channels;
    return scan.result == Result::steps ? steps : steps * scan.states;
}

}  // namespace

std::string isa() { return best_kernels().name; }

int64_t forward_workspace(const Scan&, int) { return 0; }
int64_t backward_workspace(const Scan&, int) { return 0; }

void forward(const Scan& given, void* out, Scalar out_dtype, float* checkpoints, void*, int) {
    check_routes(given);
    const FloatScan floats(given);
    const Scan& scan = *floats;
    const BlockKernels& kernels = best_kernels();
    const Split split(scan);
    const int64_t size = result_size(scan);
    Floats memory = out_dtype == Scalar::f32 ? nullptr : uninitialised(size);
    float* result = memory ? memory.get() : static_cast<float*>(out);

    parallel_for(0, scan.batch * split.blocks, 1, [&](int64_t begin, int64_t end) {
        const Floats scratch = uninitialised(forward_memory(scan, split.width));
        for (int64_t i = begin; i < end; ++i) {
            const int64_t block = i % split.blocks;
            const ForwardTask task{&scan,
                                   i / split.blocks,
                                   split.channel(block),
                                   split.count(scan, block),
                                   result,
                                   scan.checkpoint_steps > 0 ? checkpoints : nullptr};
            kernels.forward(task, split.vectors, scratch.get());
        }
    });
    store_as(out_dtype, result, out, size);
}

namespace {

// Sums parts[0..count) of `size` floats each into `total`, in order.
void add_parts(const float* parts, int64_t count, int64_t size, float* total) {
    parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t part = 0; part < count; ++part)
            for (int64_t i = begin; i < end; ++i) total[i] += parts[part * size + i];
    });
}

// A gradient that several tasks of a wave share: a part per task, summed after the wave.
class Parts {
  public:
    Parts(bool wanted, int64_t count, int64_t size) : size_(wanted ? size : 0), memory_(zeros(count * size_)) {}
    float* part(int64_t index) { return size_ > 0 ? memory_.get() + index * size_ : nullptr; }
    void add_to(int64_t first, int64_t count, float* total) {
        if (size_ > 0) add_parts(part(first), count, size_, total);
    }
    void clear(int64_t count) { std::fill_n(memory_.get(), count * size_, 0.0f); }

  private:
    int64_t size_;
    Floats memory_;
};

// A float32 tensor that becomes a gradient of the scan's dtype: the gradient itself where that is float32.
class Sum {
  public:
    Sum(Scalar dtype, void* gradient, int64_t size) : dtype_(dtype), gradient_(gradient), size_(gradient ? size : 0) {
        if (dtype != Scalar::f32)
            memory_ = zeros(size_);
        else if (size_ > 0)
            std::fill_n(data(), size_, 0.0f);
    }
    float* data() { return memory_ ? memory_.get() : static_cast<float*>(gradient_); }
    void finish() {
        if (size_ > 0) store_as(dtype_, data(), gradient_, size_);
    }

  private:
    Scalar dtype_;
    void* gradient_;
    int64_t size_;
    Floats memory_;
};

int64_t row_directions(const Scan& scan, const Rows& rows) { return rows.direction_stride == 0 ? 1 : scan.directions; }

int64_t param_size(const Scan& scan, const Param& param, int64_t features) {
    return (param.direction_stride == 0 ? 1 : scan.directions) * scan.channels * features;
}

}  // namespace

void backward(const Scan& given, const void* grad, Scalar grad_dtype, const float* checkpoints,
              const Gradients& gradients, void*, int) {
    check_routes(given);
    const FloatScan floats(given);
    const Scan& scan = *floats;
    const BlockKernels& kernels = best_kernels();
    const Split split(scan);

    const int64_t grad_size = result_size(scan);
    Floats float_grad = grad_dtype == Scalar::f32 ? nullptr : uninitialised(grad_size);
    if (float_grad) load_from(grad_dtype, grad, 0, float_grad.get(), grad_size);
    const float* result_grad = float_grad ? float_grad.get() : static_cast<const float*>(grad);

    const bool low_rank = scan.rank > 0;
    const int64_t u_size = row_directions(scan, scan.u) * scan.length * scan.channels;
    const int64_t dt_size = row_directions(scan, scan.dt) * scan.length * (low_rank ? scan.rank : scan.channels);
    const int64_t B_size = row_directions(scan, scan.B) * scan.length * scan.states;
    const int64_t C_size = row_directions(scan, scan.C) * scan.length * scan.states;
    Sum du(given.dtype, gradients.u, scan.batch * u_size), ddt(given.dtype, gradients.dt, scan.batch * dt_size);
    Sum dB(given.dtype, gradients.B, scan.batch * B_size), dC(given.dtype, gradients.C, scan.batch * C_size);

    const int64_t A_size = param_size(scan, scan.A, scan.states), D_size = param_size(scan, scan.D, 1);
    const int64_t weight_size = param_size(scan, scan.dt_weight, scan.rank);
    const int64_t bias_size = param_size(scan, scan.dt_bias, 1);
    const auto clear = [](float* to, int64_t size) {
        if (to) std::fill_n(to, size, 0.0f);
    };
    clear(gradients.A, A_size);
    clear(gradients.D, D_size);
    clear(gradients.dt_weight, weight_size);
    clear(gradients.dt_bias, bias_size);

    // Images are taken in waves, so that the parts stay small however large the batch is.
    constexpr int64_t kTasksPerWave = 64;
    const int64_t wave = std::max<int64_t>(1, std::min(scan.batch, kTasksPerWave / std::max<int64_t>(split.blocks, 1)));
    const int64_t tasks = wave * split.blocks;
    Parts dt_parts(low_rank, tasks, dt_size), B_parts(true, tasks, B_size), C_parts(gradients.C, tasks, C_size);
    Parts A_parts(true, wave, A_size), D_parts(gradients.D, wave, D_size);
    Parts weight_parts(gradients.dt_weight, wave, weight_size), bias_parts(gradients.dt_bias, wave, bias_size);

    for (int64_t first = 0; first < scan.batch; first += wave) {
        const int64_t images = std::min(wave, scan.batch - first);
        parallel_for(0, images * split.blocks, 1, [&](int64_t begin, int64_t end) {
            const Floats scratch = uninitialised(backward_memory(scan, split.width));
            for (int64_t i = begin; i < end; ++i) {
                const int64_t block = i % split.blocks, in_wave = i / split.blocks;
                BackwardTask task{};
                task.scan = &scan;
                task.image = first + in_wave;
                task.channel = split.channel(block);
                task.count = split.count(scan, block);
                task.grad = result_grad;
                task.checkpoints = checkpoints;
                task.u = du.data();
                task.dt_full = low_rank ? nullptr : ddt.data();
                task.dt_low = dt_parts.part(i);
                task.B = B_parts.part(i);
                task.C = C_parts.part(i);
                task.A = A_parts.part(in_wave);
                task.D = D_parts.part(in_wave);
                task.dt_weight = weight_parts.part(in_wave);
                task.dt_bias = bias_parts.part(in_wave);
                kernels.backward(task, split.vectors, scratch.get());
            }
        });
        for (int64_t i = 0; i < images; ++i) {
            if (low_rank) dt_parts.add_to(i * split.blocks, split.blocks, ddt.data() + (first + i) * dt_size);
            B_parts.add_to(i * split.blocks, split.blocks, dB.data() + (first + i) * B_size);
            if (gradients.C) C_parts.add_to(i * split.blocks, split.blocks, dC.data() + (first + i) * C_size);
        }
        A_parts.add_to(0, images, gradients.A);
        D_parts.add_to(0, images, gradients.D);
        weight_parts.add_to(0, images, gradients.dt_weight);
        bias_parts.add_to(0, images, gradients.dt_bias);
        if (first + wave < scan.batch) {
            dt_parts.clear(tasks), B_parts.clear(tasks), C_parts.clear(tasks);
            A_parts.clear(wave), D_parts.clear(wave), weight_parts.clear(wave), bias_parts.clear(wave);
        }
    }
    du.finish();
    ddt.finish();
    dB.finish();
    dC.finish();
}

}  // namespace vmamba::cpu

// The one file that knows both torch (its stable ABI alone) and the kernels: it checks what memory safety needs, turns
// tensors into a Scan, and registers the kernels. Shapes and dtypes are explained to the user in Python, before this.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/scan_cpu.h"
#include "operators.h"
#include "scan.h"
#ifdef VMAMBA_WITH_CUDA
#include "cuda/conv_norm_gelu.h"
#include "cuda/depthwise_conv.h"
#include "cuda/gelu.h"
#include "cuda/layer_norm.h"
#include "cuda/mlp.h"
#include "cuda/norm_linear.h"
#include "cuda/scan_cuda.h"
#endif

namespace vmamba {

Scalar scalar_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return Scalar::f32;
        case ScalarType::BFloat16:
            return Scalar::bf16;
        case ScalarType::Half:
            return Scalar::f16;
        default:
            STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
    }
}

Result result_of(const std::string& name) {
    if (name == "merged") return Result::merged;
    if (name == "steps") return Result::steps;
    STD_TORCH_CHECK(name == "states", "result must be 'merged', 'steps' or 'states', got '", name, "'");
    return Result::states;
}

bool same_sizes(const Tensor& x, const std::vector<int64_t>& sizes) {
    return std::equal(sizes.begin(), sizes.end(), x.sizes().begin(), x.sizes().end());
}

// As torch::stable::new_empty, which asks the dispatcher twice.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t dim = sizes.size(); dim-- > 0; stride *= std::max<int64_t>(sizes[dim], 1)) strides[dim] = stride;
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    AtenTensorHandle tensor = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                                 like.get_device_index(), &tensor));
    return Tensor(tensor);
}

// What fails here is an allocation, unless the device has failed before; its error arrives without its type and its
// words, which programs look for.
Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
    try {
        return empty(like, sizes, dtype);
    } catch (const std::exception&) {
#ifdef VMAMBA_WITH_CUDA
        if (like.is_cuda()) cuda::check_for_earlier_failure();
#endif
        int64_t bytes = dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
        for (const int64_t size : sizes) bytes *= size;
        STD_TORCH_CHECK(false, "out of memory: a vmamba operator could not allocate ", bytes, " bytes (",
                        like.is_cuda() ? "on the GPU" : "on the CPU", "); use a smaller batch or smaller images");
    }
}

#ifdef VMAMBA_WITH_CUDA
// As narrow and its like, which go through the dispatcher.
Tensor strided(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
               int64_t offset) {
    AtenTensorHandle view = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                          strides.data(), x.storage_offset() + offset, &view));
    return Tensor(view);
}

Tensor features_of(const Tensor& params, int64_t first, int64_t count) {
    return strided(params, {params.size(0), params.size(1), params.size(2), count},
                   {params.stride(0), params.stride(1), params.stride(2), params.stride(3)}, first * params.stride(3));
}
#endif

// Asked first, since even to do nothing the operator goes through the dispatcher.
Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

std::string device_of(const Tensor& x) {
    return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : std::string("the CPU");
}

// Kernels follow pointers wherever they lead.
void check_device(const Tensor& x, const char* name, const Tensor& map, const char* map_name) {
    STD_TORCH_CHECK(x.is_cuda() == map.is_cuda() && x.get_device_index() == map.get_device_index(), name, " is on ",
                    device_of(x), " but ", map_name, " is on ", device_of(map), "; move it there");
}

// The tensors of one call, and the Scan that describes them. Tensors that had to be made contiguous live in here.
class Arguments {
  public:
    Arguments(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const OptionalTensor& C,
              const OptionalTensor& D, const OptionalTensor& dt_weight, const OptionalTensor& dt_bias,
              const Tensor& route, const OptionalTensor& param_route, const OptionalTensor& reset, bool dt_softplus,
              const std::string& result, int64_t checkpoint_steps)
        : u_(u) {
        STD_TORCH_CHECK(u.dim() == 3 || u.dim() == 4, "u must have 3 or 4 dimensions");
        STD_TORCH_CHECK(A.dim() == 3, "A must have 3 dimensions");
        STD_TORCH_CHECK(route.dim() == 2 || route.dim() == 3, "route must have 2 or 3 dimensions");
        scan.batch = u.size(0);
        scan.length = u.size(u.dim() - 2);
        scan.channels = u.size(u.dim() - 1);
        scan.directions = route.size(route.dim() - 2);
        scan.steps = route.size(route.dim() - 1);
        scan.states = A.size(2);
        scan.rank = dt_weight ? dt_weight->size(2) : 0;
        STD_TORCH_CHECK(scan.directions > 0, "route must have at least one direction");
        STD_TORCH_CHECK(!dt_weight || scan.rank > 0, "dt_weight must expand steps of a rank of at least one");
        scan.dtype = scalar_of(u.scalar_type());
        scan.result = result_of(result);
        scan.dt_softplus = dt_softplus;
        scan.checkpoint_steps = checkpoint_steps;

        scan.u = input_rows(u);
        scan.dt = parameter_rows(dt, "dt", dt_weight ? scan.rank : scan.channels);
        scan.B = parameter_rows(B, "B", scan.states);
        if (C) scan.C = parameter_rows(*C, "C", scan.states);
        STD_TORCH_CHECK(C || scan.result == Result::states, "C may only be absent for result='states'");

        scan.A = param(A, "A", scan.channels * scan.states);
        if (D) scan.D = param(*D, "D", scan.channels);
        if (dt_weight) scan.dt_weight = param(*dt_weight, "dt_weight", scan.channels * scan.rank);
        if (dt_bias) scan.dt_bias = param(*dt_bias, "dt_bias", scan.channels);

        scan.route = table<int32_t>(route, ScalarType::Int, "route");
        scan.param_route = param_route ? table<int32_t>(*param_route, ScalarType::Int, "param_route") : scan.route;
        if (reset) scan.reset = table<uint8_t>(*reset, ScalarType::Bool, "reset");
    }

    std::vector<int64_t> output_sizes() const {
        switch (scan.result) {
            case Result::merged:
                return {scan.batch, scan.length, scan.channels};
            case Result::steps:
                return {scan.batch, scan.directions, scan.steps, scan.channels};
            default:
                return {scan.batch, scan.directions, scan.steps, scan.channels, scan.states};
        }
    }

    std::vector<int64_t> checkpoint_sizes() const {
        const int64_t every = scan.checkpoint_steps;
        const int64_t kept = every > 0 ? (scan.steps + every - 1) / every : 0;
        return {scan.batch, scan.directions, kept, scan.channels, scan.states};
    }

    Scan scan;

  private:
    Tensor keep(const Tensor& tensor) {
        kept_.push_back(tensor);
        return tensor;
    }

    Tensor with_contiguous_rows(const Tensor& x) {
        const bool in_a_row = x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
        return keep(in_a_row ? x : dense(x));
    }

    Rows input_rows(const Tensor& u) {
        // A stride of 0 would say that the directions share one gradient.
        const bool expanded = u.dim() == 4 && u.size(1) > 1 && u.stride(1) == 0;
        const Tensor x = expanded ? keep(dense(u)) : with_contiguous_rows(u);
        if (x.dim() == 3) return {x.const_data_ptr(), x.stride(0), 0, x.stride(1)};
        STD_TORCH_CHECK(x.size(1) == scan.directions, "u has the wrong number of directions");
        return {x.const_data_ptr(), x.stride(0), x.size(1) == 1 ? 0 : x.stride(1), x.stride(2)};
    }

    // (batch, L, K or 1, features)
    Rows parameter_rows(const Tensor& tensor, const char* name, int64_t features) {
        check_device(tensor, name, u_, "u");
        const bool shared = tensor.dim() == 4 && tensor.size(2) == 1;
        STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == scan.batch && tensor.size(1) == scan.length &&
                            (shared || tensor.size(2) == scan.directions) && tensor.size(3) == features,
                        name, " has the wrong shape");
        STD_TORCH_CHECK(scalar_of(tensor.scalar_type()) == scan.dtype, name, " must have the dtype of u");
        const bool expanded = !shared && tensor.stride(2) == 0;
        const Tensor x = expanded ? keep(dense(tensor)) : with_contiguous_rows(tensor);
        return {x.const_data_ptr(), x.stride(0), shared ? 0 : x.stride(2), x.stride(1)};
    }

    Param param(const Tensor& tensor, const char* name, int64_t features) {
        check_device(tensor, name, u_, "u");
        const int64_t count = tensor.size(0);
        STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
        STD_TORCH_CHECK((count == 1 || count == scan.directions) && tensor.numel() == count * features, name,
                        " has the wrong shape");
        const Tensor x = keep(dense(tensor));
        return {static_cast<const float*>(x.const_data_ptr()), count == 1 ? 0 : features};
    }

    template <typename T>
    Table<T> table(const Tensor& tensor, ScalarType type, const char* name) {
        check_device(tensor, name, u_, "u");
        STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
        const bool per_image = tensor.dim() == 3;
        STD_TORCH_CHECK((!per_image || tensor.size(0) == scan.batch) &&
                            tensor.size(tensor.dim() - 2) == scan.directions &&
                            tensor.size(tensor.dim() - 1) == scan.steps,
                        name, " has the wrong shape");
        const Tensor x = keep(dense(tensor));
        const int64_t image = scan.directions * scan.steps;
        return {static_cast<const T*>(x.const_data_ptr()), per_image ? image : 0, scan.steps};
    }

    Tensor u_;
    std::vector<Tensor> kept_;
};

// The kernels of one device. Workspace is memory the kernel needs beside its outputs, in bytes.
struct Kernels {
    int64_t (*forward_workspace)(const Scan&, int device);
    void (*forward)(const Scan&, void* out, Scalar out_dtype, float* checkpoints, void* workspace, int device);
    int64_t (*backward_workspace)(const Scan&, int device);
    void (*backward)(const Scan&, const void* grad, Scalar grad_dtype, const float* checkpoints, const Gradients&,
                     void* workspace, int device);
};

constexpr Kernels kCpu{cpu::forward_workspace, cpu::forward, cpu::backward_workspace, cpu::backward};
#ifdef VMAMBA_WITH_CUDA
constexpr Kernels kCuda{cuda::forward_workspace, cuda::forward, cuda::backward_workspace, cuda::backward};
#endif

template <const Kernels& kernels>
std::tuple<Tensor, Tensor> forward(Tensor u, Tensor dt, Tensor A, Tensor B, OptionalTensor C, OptionalTensor D,
                                   OptionalTensor dt_weight, OptionalTensor dt_bias, Tensor route,
                                   OptionalTensor param_route, OptionalTensor reset, bool dt_softplus,
                                   std::string result, ScalarType out_dtype, int64_t checkpoint_steps) {
    const Arguments arguments(u, dt, A, B, C, D, dt_weight, dt_bias, route, param_route, reset, dt_softplus, result,
                              checkpoint_steps);
    const Scan& scan = arguments.scan;
    Tensor out = new_tensor(u, arguments.output_sizes(), out_dtype);
    Tensor checkpoints = new_tensor(u, arguments.checkpoint_sizes(), ScalarType::Float);
    const int device = u.get_device_index();
    Tensor workspace = new_tensor(u, {kernels.forward_workspace(scan, device)}, ScalarType::Byte);
    kernels.forward(scan, out.mutable_data_ptr(), scalar_of(out_dtype),
                    static_cast<float*>(checkpoints.mutable_data_ptr()), workspace.mutable_data_ptr(), device);
    return {out, checkpoints};
}

// An uninitialised gradient of the input's shape; without an input, an empty tensor.
Tensor gradient_for(const OptionalTensor& input, const Tensor& like) {
    if (!input) return new_tensor(like, {0}, ScalarType::Float);
    const auto sizes = input->sizes();
    return new_tensor(*input, std::vector<int64_t>(sizes.begin(), sizes.end()), input->scalar_type());
}

// Runs the backward: `gradients` has a place for every input.
template <const Kernels& kernels>
void run_backward(const Arguments& arguments, const Tensor& u, const Tensor& grad, const Tensor& checkpoints,
                  const Gradients& gradients) {
    const Scan& scan = arguments.scan;
    STD_TORCH_CHECK(scan.checkpoint_steps > 0, "the backward needs the checkpoints of a forward that kept them");
    const Tensor dense_grad = dense(grad);
    STD_TORCH_CHECK(same_sizes(dense_grad, arguments.output_sizes()), "grad has the wrong shape");
    STD_TORCH_CHECK(same_sizes(checkpoints, arguments.checkpoint_sizes()), "checkpoints have the wrong shape");
    check_device(grad, "grad", u, "u");
    check_device(checkpoints, "checkpoints", u, "u");
    const int device = u.get_device_index();
    Tensor workspace = new_tensor(u, {kernels.backward_workspace(scan, device)}, ScalarType::Byte);
    kernels.backward(scan, dense_grad.const_data_ptr(), scalar_of(grad.scalar_type()),
                     static_cast<const float*>(checkpoints.const_data_ptr()), gradients, workspace.mutable_data_ptr(),
                     device);
}

float* floats_of(Tensor& gradient, const OptionalTensor& input) {
    return input ? static_cast<float*>(gradient.mutable_data_ptr()) : nullptr;
}

template <const Kernels& kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor checkpoints, Tensor u, Tensor dt, Tensor A, Tensor B, OptionalTensor C, OptionalTensor D,
    OptionalTensor dt_weight, OptionalTensor dt_bias, Tensor route, OptionalTensor param_route, OptionalTensor reset,
    bool dt_softplus, std::string result, int64_t checkpoint_steps) {
    const Arguments arguments(u, dt, A, B, C, D, dt_weight, dt_bias, route, param_route, reset, dt_softplus, result,
                              checkpoint_steps);
    Tensor du = gradient_for(u, u), ddt = gradient_for(dt, u), dA = gradient_for(A, u), dB = gradient_for(B, u);
    Tensor dC = gradient_for(C, u), dD = gradient_for(D, u);
    Tensor ddt_weight = gradient_for(dt_weight, u), ddt_bias = gradient_for(dt_bias, u);
    Gradients gradients;
    gradients.u = du.mutable_data_ptr();
    gradients.dt = ddt.mutable_data_ptr();
    gradients.B = dB.mutable_data_ptr();
    gradients.C = C ? dC.mutable_data_ptr() : nullptr;
    gradients.A = floats_of(dA, A);
    gradients.D = floats_of(dD, D);
    gradients.dt_weight = floats_of(ddt_weight, dt_weight);
    gradients.dt_bias = floats_of(ddt_bias, dt_bias);
    run_backward<kernels>(arguments, u, grad, checkpoints, gradients);
    return {du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias};
}

#ifdef VMAMBA_WITH_CUDA
std::tuple<Tensor, Tensor> forward_on_gpu(Tensor u, Tensor dt, Tensor A, Tensor B, OptionalTensor C, OptionalTensor D,
                                          OptionalTensor dt_weight, OptionalTensor dt_bias, Tensor route,
                                          OptionalTensor param_route, OptionalTensor reset, bool dt_softplus,
                                          std::string result, ScalarType out_dtype, int64_t checkpoint_steps) {
    return forward<kCuda>(u, dt, A, B, C, D, dt_weight, dt_bias, route, param_route, reset, dt_softplus, result,
                          out_dtype, checkpoint_steps);
}

// The same where dt, B and C are parts of the rows of `params`, in this order: their gradients are written as such.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rows_backward(Tensor grad, Tensor checkpoints, Tensor u,
                                                                         Tensor params, Tensor A, Tensor D,
                                                                         Tensor dt_weight, Tensor dt_bias, Tensor route,
                                                                         std::string result, int64_t checkpoint_steps) {
    STD_TORCH_CHECK(A.dim() == 3 && dt_weight.dim() == 3, "A and dt_weight must have 3 dimensions");
    const int64_t rank = dt_weight.size(2), states = A.size(2), features = rank + 2 * states;
    STD_TORCH_CHECK(params.dim() == 4 && params.size(3) == features, "params must be (batch, L, K, ", features, ")");
    const Tensor dt = features_of(params, 0, rank), B = features_of(params, rank, states),
                 C = features_of(params, rank + states, states);
    const Arguments arguments(u, dt, A, B, C, D, dt_weight, dt_bias, route, std::nullopt, std::nullopt, true, result,
                              checkpoint_steps);
    Tensor du = gradient_for(u, u), dparams = gradient_for(params, u), dA = gradient_for(A, u), dD = gradient_for(D, u);
    Tensor ddt_weight = gradient_for(dt_weight, u), ddt_bias = gradient_for(dt_bias, u);
    char* const row = static_cast<char*>(dparams.mutable_data_ptr());
    Gradients gradients;
    gradients.u = du.mutable_data_ptr();
    gradients.dt = row;
    gradients.B = row + rank * params.element_size();
    gradients.C = row + (rank + states) * params.element_size();
    gradients.row_stride = features;
    gradients.A = floats_of(dA, A);
    gradients.D = floats_of(dD, D);
    gradients.dt_weight = floats_of(ddt_weight, dt_weight);
    gradients.dt_bias = floats_of(ddt_bias, dt_bias);
    run_backward<kCuda>(arguments, u, grad, checkpoints, gradients);
    return {du, dparams, dA, dD, ddt_weight, ddt_bias};
}

// Kernels read packs of `count` numbers, and a view may start in the middle of one.
Tensor in_packs(const Tensor& given, int64_t count = 4) {
    const Tensor x = dense(given);
    const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
    return address % (count * x.element_size()) == 0 ? x : torch::stable::clone(x);
}

LayerNorm norm_of(const Tensor& x, const Tensor& weight, double eps, ScalarType y_dtype) {
    LayerNorm norm;
    norm.channels = x.size(x.dim() - 1);
    norm.rows = norm.channels > 0 ? x.numel() / norm.channels : 0;
    check_device(weight, "weight", x, "x");
    STD_TORCH_CHECK(cuda::serves_layer_norm(norm.channels), "layer_norm serves multiples of 4 up to ",
                    cuda::kMaxNormChannels, " channels, got ", norm.channels);
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.numel() == norm.channels,
                    "weight must be float32, one per channel");
    norm.x = x.const_data_ptr();
    norm.weight = static_cast<const float*>(weight.const_data_ptr());
    norm.eps = static_cast<float>(eps);
    norm.x_dtype = scalar_of(x.scalar_type());
    norm.y_dtype = scalar_of(y_dtype);
    STD_TORCH_CHECK(norm.x_dtype == Scalar::f32 || norm.y_dtype == Scalar::f32 || norm.x_dtype == norm.y_dtype,
                    "layer_norm goes from one 16-bit dtype to float32 or itself, not to the other one");
    return norm;
}

Tensor float_rows(const Tensor& x, int64_t rows) { return new_tensor(x, {rows}, ScalarType::Float); }

std::vector<int64_t> sizes_of(const Tensor& x) {
    const auto sizes = x.sizes();
    return {sizes.begin(), sizes.end()};
}

NormResult run_layer_norm(const Tensor& given, const OptionalTensor& given_branch, const Tensor& given_weight,
                          const Tensor& given_bias, double eps, ScalarType out_dtype, bool with_statistics) {
    const Tensor x = in_packs(given), weight = in_packs(given_weight), bias = in_packs(given_bias);
    LayerNorm norm = norm_of(x, weight, eps, out_dtype);
    check_device(bias, "bias", x, "x");
    STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.numel() == norm.channels,
                    "bias must be float32, one per channel");
    norm.bias = static_cast<const float*>(bias.const_data_ptr());
    NormResult result;
    result.y = new_tensor(x, sizes_of(x), out_dtype);
    OptionalTensor branch;
    if (given_branch) {
        branch = in_packs(*given_branch);
        check_device(*branch, "branch", x, "x");
        STD_TORCH_CHECK(branch->scalar_type() == out_dtype && same_sizes(*branch, sizes_of(x)),
                        "branch must have the shape of x and the dtype of the result");
        norm.branch = branch->const_data_ptr();
        result.sum = new_tensor(x, sizes_of(x), x.scalar_type());
    }
    const auto statistic = [&](Tensor& tensor) -> float* {
        if (!with_statistics) return nullptr;
        tensor = float_rows(x, norm.rows);
        return static_cast<float*>(tensor.mutable_data_ptr());
    };
    float* means = statistic(result.mean);
    float* rstds = statistic(result.rstd);
    cuda::layer_norm_forward(norm, result.y.mutable_data_ptr(), branch ? result.sum.mutable_data_ptr() : nullptr, means,
                             rstds, x.get_device_index());
    return result;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, Tensor bias, double eps, ScalarType out_dtype) {
    const NormResult result = run_layer_norm(x, std::nullopt, weight, bias, eps, out_dtype, true);
    return {result.y, result.mean, result.rstd};
}

Tensor layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double eps, ScalarType out_dtype) {
    return run_layer_norm(x, std::nullopt, weight, bias, eps, out_dtype, false).y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias,
                                                          double eps, ScalarType out_dtype) {
    const NormResult result = run_layer_norm(x, branch, weight, bias, eps, out_dtype, true);
    return {result.sum, result.y, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_layer_norm_backward(const Tensor& grad, const OptionalTensor& grad_sum,
                                                                   const Tensor& given, const Tensor& given_weight,
                                                                   const Tensor& mean, const Tensor& rstd) {
    const Tensor x = in_packs(given), dy = in_packs(grad), weight = in_packs(given_weight);
    const LayerNorm norm = norm_of(x, weight, 0.0, dy.scalar_type());
    check_device(dy, "grad", x, "x");
    check_device(mean, "mean", x, "x");
    check_device(rstd, "rstd", x, "x");
    STD_TORCH_CHECK(dy.numel() == x.numel() && mean.numel() == norm.rows && rstd.numel() == norm.rows,
                    "grad, mean and rstd must be those of x");
    Tensor dx = new_tensor(x, sizes_of(x), x.scalar_type());
    Tensor dbranch;
    Tensor dweight = float_rows(x, norm.channels), dbias = float_rows(x, norm.channels);
    cuda::LayerNormGradients gradients;
    OptionalTensor dsum;
    if (grad_sum) {
        dsum = in_packs(*grad_sum);
        check_device(*dsum, "grad_sum", x, "x");
        STD_TORCH_CHECK(dsum->scalar_type() == x.scalar_type() && dsum->numel() == x.numel(),
                        "grad_sum must have the shape and dtype of the sum");
        dbranch = new_tensor(x, sizes_of(x), dy.scalar_type());
        gradients.dsum = dsum->const_data_ptr();
        gradients.dbranch = dbranch.mutable_data_ptr();
    }
    gradients.dy = dy.const_data_ptr();
    gradients.mean = static_cast<const float*>(mean.const_data_ptr());
    gradients.rstd = static_cast<const float*>(rstd.const_data_ptr());
    gradients.dx = dx.mutable_data_ptr();
    gradients.dweight = static_cast<float*>(dweight.mutable_data_ptr());
    gradients.dbias = static_cast<float*>(dbias.mutable_data_ptr());
    const int device = x.get_device_index();
    Tensor workspace = new_tensor(x, {cuda::layer_norm_backward_workspace(norm, device)}, ScalarType::Byte);
    cuda::layer_norm_backward(norm, gradients, workspace.mutable_data_ptr(), device);
    return {dx, dbranch, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
    const auto [dx, dbranch, dweight, dbias] = run_layer_norm_backward(grad, std::nullopt, x, weight, mean, rstd);
    return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_sum, Tensor grad, Tensor sum,
                                                                   Tensor weight, Tensor mean, Tensor rstd) {
    return run_layer_norm_backward(grad, grad_sum, sum, weight, mean, rstd);
}

Tensor gelu(Tensor given) {
    const Tensor x = in_packs(given, cuda::kGeluPack);
    STD_TORCH_CHECK(x.numel() % cuda::kGeluPack == 0, "gelu serves multiples of ", cuda::kGeluPack, " numbers, got ",
                    x.numel());
    Tensor y = new_tensor(x, sizes_of(x), x.scalar_type());
    cuda::gelu_forward(x.const_data_ptr(), y.mutable_data_ptr(), x.numel(), scalar_of(x.scalar_type()),
                       x.get_device_index());
    return y;
}

Tensor gelu_with_bias(Tensor x, Tensor bias) { return gelu(x); }

std::tuple<Tensor, Tensor> gelu_backward(Tensor grad, Tensor given) {
    const Tensor x = in_packs(given, cuda::kGeluPack), dy = in_packs(grad, cuda::kGeluPack);
    check_device(dy, "grad", x, "x");
    STD_TORCH_CHECK(x.dim() > 0 && dy.scalar_type() == x.scalar_type() && same_sizes(dy, sizes_of(x)),
                    "grad must have the shape and dtype of x");
    cuda::GeluBackward gelu;
    gelu.columns = x.size(x.dim() - 1);
    STD_TORCH_CHECK(cuda::serves_gelu(gelu.columns), "gelu serves multiples of ", cuda::kGeluPack, " columns, got ",
                    gelu.columns);
    gelu.rows = x.numel() / gelu.columns;
    gelu.dtype = scalar_of(x.scalar_type());
    Tensor dx = new_tensor(x, sizes_of(x), x.scalar_type()), dbias = float_rows(x, gelu.columns);
    gelu.grad = dy.const_data_ptr();
    gelu.x = x.const_data_ptr();
    gelu.dx = dx.mutable_data_ptr();
    gelu.dbias = static_cast<float*>(dbias.mutable_data_ptr());
    const int device = x.get_device_index();
    Tensor workspace = new_tensor(x, {cuda::gelu_backward_workspace(gelu, device)}, ScalarType::Byte);
    cuda::gelu_backward(gelu, workspace.mutable_data_ptr(), device);
    return {dx, dbias};
}

// What both directions of an MLP read, checked: in `dtype` all but the biases, and x where a residual branch says what
// it is. Tensors that had to be copied live in here.
class MlpArguments {
  public:
    MlpArguments(const Tensor& given, ScalarType dtype, const Tensor& given_weight1, const Tensor& given_bias1)
        : x(in_packs(given, kPack)),
          weight1(in_packs(given_weight1, kPack)),
          bias1(in_packs(given_bias1, kPack)),
          dtype_(dtype) {
        check(weight1, "weight1");
        STD_TORCH_CHECK(x.dim() > 0 && weight1.dim() == 2 && weight1.size(1) == x.size(x.dim() - 1),
                        "x must be (..., channels) and weight1 (hidden, channels)");
        check_bias(bias1, "bias1", weight1.size(0));
        mlp.channels = static_cast<int>(weight1.size(1));
        mlp.hidden = static_cast<int>(weight1.size(0));
        mlp.rows = x.numel() / weight1.size(1);
        mlp.dtype = scalar_of(dtype);
        STD_TORCH_CHECK(mlp.dtype != Scalar::f32, "mlp serves bfloat16 and float16");
        mlp.x = x.const_data_ptr();
        mlp.weight1 = weight1.const_data_ptr();
        mlp.bias1 = static_cast<const float*>(bias1.const_data_ptr());
    }
    Tensor check(const Tensor& given, const char* name) const {
        const Tensor tensor = in_packs(given, kPack);
        check_device(tensor, name, x, "x");
        STD_TORCH_CHECK(tensor.scalar_type() == dtype_, name, " must have the dtype of ",
                        dtype_ == x.scalar_type() ? "x" : "weight1");
        return tensor;
    }
    Tensor weight(const Tensor& given, const char* name, int64_t rows, int64_t columns) const {
        const Tensor tensor = check(given, name);
        STD_TORCH_CHECK(same_sizes(tensor, {rows, columns}), name, " must be (", rows, ", ", columns, ")");
        return tensor;
    }
    void check_bias(const Tensor& bias, const char* name, int64_t numbers) const {
        check_device(bias, name, x, "x");
        STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && same_sizes(bias, {numbers}), name, " must be ",
                        numbers, " numbers in float32");
    }

    cuda::Mlp mlp;
    Tensor x, weight1, bias1;

  protected:
    static constexpr int64_t kPack = 8;  // numbers of 16 bits, read at a time

  private:
    ScalarType dtype_;
};

class MlpForwardArguments : public MlpArguments {
  public:
    MlpForwardArguments(const Tensor& given, ScalarType dtype, const Tensor& weight1, const Tensor& bias1,
                        const Tensor& given_weight2, const Tensor& given_bias2)
        : MlpArguments(given, dtype, weight1, bias1), forward{mlp}, bias2(in_packs(given_bias2, kPack)) {
        STD_TORCH_CHECK(cuda::serves_mlp(mlp.channels, mlp.hidden), "mlp does not serve ", mlp.channels,
                        " channels with ", mlp.hidden, " hidden units");
        weight2 = weight(given_weight2, "weight2", mlp.channels, mlp.hidden);
        check_bias(bias2, "bias2", mlp.channels);
        forward.weight2 = weight2.const_data_ptr();
        forward.bias2 = static_cast<const float*>(bias2.const_data_ptr());
    }

    cuda::MlpForward forward;
    Tensor weight2, bias2;
};

Tensor mlp(Tensor given, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) {
    const MlpForwardArguments arguments(given, given.scalar_type(), weight1, bias1, weight2, bias2);
    Tensor y = new_tensor(arguments.x, sizes_of(arguments.x), arguments.x.scalar_type());
    cuda::MlpForward mlp{arguments.forward};
    mlp.y = y.mutable_data_ptr();
    cuda::mlp_forward(mlp, y.get_device_index());
    return y;
}

Tensor mlp_residual(Tensor given, OptionalTensor given_branch, OptionalTensor branch_norm_weight,
                    OptionalTensor branch_norm_bias, double branch_eps, OptionalTensor given_projection,
                    Tensor norm_weight, Tensor norm_bias, double eps, Tensor weight1, Tensor bias1, Tensor weight2,
                    Tensor bias2) {
    const MlpForwardArguments arguments(given, weight1.scalar_type(), weight1, bias1, weight2, bias2);
    const Tensor& x = arguments.x;
    cuda::MlpResidual mlp{arguments.forward};
    mlp.x_dtype = scalar_of(x.scalar_type());
    STD_TORCH_CHECK(mlp.x_dtype == Scalar::f32 || mlp.x_dtype == mlp.dtype,
                    "x must be float32 or have the dtype of weight1");
    OptionalTensor branch, projection;
    std::vector<Tensor> kept;
    const auto numbers = [&](const Tensor& tensor, const char* name) {
        kept.push_back(dense(tensor));
        arguments.check_bias(kept.back(), name, mlp.channels);
        return static_cast<const float*>(kept.back().const_data_ptr());
    };
    if (given_branch) {
        branch = arguments.check(*given_branch, "branch");
        STD_TORCH_CHECK(same_sizes(*branch, sizes_of(x)), "branch must have the shape of x");
        mlp.branch = branch->const_data_ptr();
    }
    if (given_projection) {
        STD_TORCH_CHECK(branch && branch_norm_weight && branch_norm_bias,
                        "a projection takes a branch and the parameters of its norm");
        projection = arguments.weight(*given_projection, "projection", mlp.channels, mlp.channels);
        mlp.projection = projection->const_data_ptr();
        mlp.branch_norm = {numbers(*branch_norm_weight, "branch_norm_weight"),
                           numbers(*branch_norm_bias, "branch_norm_bias"), static_cast<float>(branch_eps)};
    }
    mlp.norm = {numbers(norm_weight, "norm_weight"), numbers(norm_bias, "norm_bias"), static_cast<float>(eps)};
    Tensor y = new_tensor(x, sizes_of(x), x.scalar_type());
    mlp.y = y.mutable_data_ptr();
    cuda::mlp_residual(mlp, y.get_device_index());
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_backward(Tensor given_grad, Tensor given, Tensor given_weight1,
                                                        Tensor given_weight1_t, Tensor given_bias1,
                                                        Tensor given_weight2_t) {
    const MlpArguments arguments(given, given.scalar_type(), given_weight1, given_bias1);
    const Tensor& x = arguments.x;
    cuda::MlpBackward mlp{arguments.mlp};
    STD_TORCH_CHECK(cuda::serves_mlp_backward(mlp.channels, mlp.hidden), "mlp has no backward for ", mlp.channels,
                    " channels with ", mlp.hidden, " hidden units");
    const Tensor grad = arguments.check(given_grad, "grad");
    STD_TORCH_CHECK(same_sizes(grad, sizes_of(x)), "grad must have the shape of x");
    const Tensor weight1_t = arguments.weight(given_weight1_t, "weight1_t", mlp.channels, mlp.hidden);
    const Tensor weight2_t = arguments.weight(given_weight2_t, "weight2_t", mlp.hidden, mlp.channels);
    std::vector<int64_t> wide = sizes_of(x);
    wide.back() = mlp.hidden;
    Tensor dx = new_tensor(x, sizes_of(x), x.scalar_type());
    Tensor activation = new_tensor(x, wide, x.scalar_type()), dhidden = new_tensor(x, wide, x.scalar_type());
    Tensor dbias1 = float_rows(x, mlp.hidden);
    mlp.grad = grad.const_data_ptr();
    mlp.weight1_t = weight1_t.const_data_ptr();
    mlp.weight2_t = weight2_t.const_data_ptr();
    mlp.dx = dx.mutable_data_ptr();
    mlp.activation = activation.mutable_data_ptr();
    mlp.dhidden = dhidden.mutable_data_ptr();
    mlp.dbias1 = static_cast<float*>(dbias1.mutable_data_ptr());
    const int device = x.get_device_index();
    Tensor workspace = new_tensor(x, {cuda::mlp_backward_workspace(mlp, device)}, ScalarType::Byte);
    cuda::mlp_backward(mlp, workspace.mutable_data_ptr(), device);
    return {dx, activation, dhidden, dbias1};
}

const float* channel_numbers(const Tensor& tensor, const char* name, const Tensor& x, int64_t channels) {
    check_device(tensor, name, x, "x");
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && same_sizes(tensor, {channels}), name,
                    " must be float32, one per channel");
    return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor norm_linear(Tensor given, Tensor given_norm_weight, Tensor given_norm_bias, double eps, Tensor given_weight) {
    const Tensor x = in_packs(given, 8), weight = in_packs(given_weight, 8);
    STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1),
                    "x must be (..., channels) and weight (out_channels, channels)");
    cuda::NormLinear layer;
    STD_TORCH_CHECK(cuda::serves_norm_linear(weight.size(1), weight.size(0)), "norm_linear does not serve ",
                    weight.size(1), " channels to ", weight.size(0));
    check_device(weight, "weight", x, "x");
    layer.channels = static_cast<int>(weight.size(1));
    layer.out_channels = static_cast<int>(weight.size(0));
    layer.rows = x.numel() / layer.channels;
    layer.x_dtype = scalar_of(x.scalar_type());
    layer.dtype = scalar_of(weight.scalar_type());
    STD_TORCH_CHECK(layer.dtype != Scalar::f32 && (layer.x_dtype == Scalar::f32 || layer.x_dtype == layer.dtype),
                    "weight must have 16 bits, and x be float32 or have the dtype of weight");
    const Tensor norm_weight = dense(given_norm_weight), norm_bias = dense(given_norm_bias);
    const auto numbers = [&](const Tensor& tensor, const char* name) {
        return channel_numbers(tensor, name, x, layer.channels);
    };
    layer.norm_weight = numbers(norm_weight, "norm_weight");
    layer.norm_bias = numbers(norm_bias, "norm_bias");
    layer.eps = static_cast<float>(eps);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = layer.out_channels;
    Tensor y = new_tensor(x, sizes, weight.scalar_type());
    layer.x = x.const_data_ptr();
    layer.weight = weight.const_data_ptr();
    layer.y = y.mutable_data_ptr();
    cuda::norm_linear(layer, x.get_device_index());
    return y;
}

// A window's numbers are reached by 32-bit distances.
Tensor with_near_neighbours(const Tensor& image) {
    int64_t furthest = 0;
    for (int64_t dim = 1; dim < 4; ++dim) furthest += 2 * image.stride(dim);
    return furthest < (int64_t{1} << 31) ? image : torch::stable::contiguous(image);
}

Tensor conv_norm_gelu(Tensor given, Tensor weight, Tensor given_bias, Tensor given_norm_weight, Tensor given_norm_bias,
                      double eps, int64_t stride, ScalarType out_dtype) {
    STD_TORCH_CHECK(given.dim() == 4 && given.size(1) == cuda::kStemKernel && given.numel() > 0 &&
                        std::max(given.size(2), given.size(3)) < (int64_t{1} << 31),
                    "x must be images, (batch, 3, height, width)");
    const Tensor x = with_near_neighbours(given);
    cuda::ConvNormGelu stem;
    stem.channels = static_cast<int>(weight.size(0));
    STD_TORCH_CHECK(cuda::serves_conv_norm_gelu(stem.channels), "conv_norm_gelu does not serve ", stem.channels,
                    " channels");
    check_device(weight, "weight", x, "x");
    STD_TORCH_CHECK(
        weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && same_sizes(weight, {stem.channels, 3, 3, 3}),
        "weight must be (channels, 3, 3, 3), in float32");
    STD_TORCH_CHECK(stride > 0 && stride < (int64_t{1} << 31), "stride must be positive, got ", stride);
    const auto numbers = [&](const Tensor& tensor, const char* name) {
        return channel_numbers(tensor, name, x, stem.channels);
    };
    const Tensor bias = in_packs(given_bias), norm_weight = in_packs(given_norm_weight),
                 norm_bias = in_packs(given_norm_bias);
    stem.bias = numbers(bias, "bias");
    stem.norm_weight = numbers(norm_weight, "norm_weight");
    stem.norm_bias = numbers(norm_bias, "norm_bias");
    stem.weight = static_cast<const float*>(weight.const_data_ptr());
    for (int dim = 0; dim < 4; ++dim) stem.weight_strides[dim] = weight.stride(dim);
    stem.image = x.const_data_ptr();
    stem.image_stride = x.stride(0);
    stem.channel_stride = static_cast<int>(x.stride(1));
    stem.row_stride = static_cast<int>(x.stride(2));
    stem.column_stride = static_cast<int>(x.stride(3));
    stem.batch = x.size(0);
    stem.height = static_cast<int>(x.size(2));
    stem.width = static_cast<int>(x.size(3));
    stem.stride = static_cast<int>(stride);
    stem.eps = static_cast<float>(eps);
    stem.image_dtype = scalar_of(x.scalar_type());
    stem.y_dtype = scalar_of(out_dtype);
    STD_TORCH_CHECK(
        stem.y_dtype != Scalar::f32 && (stem.image_dtype == Scalar::f32 || stem.image_dtype == stem.y_dtype),
        "conv_norm_gelu goes from float32 or 16 bits to 16 bits of one dtype");
    STD_TORCH_CHECK(stem.positions() < (int64_t{1} << 31), "conv_norm_gelu serves less than 2^31 positions, got ",
                    stem.positions());
    Tensor y = new_tensor(x, {stem.batch, stem.out_height(), stem.out_width(), stem.channels}, out_dtype);
    stem.y = y.mutable_data_ptr();
    cuda::conv_norm_gelu(stem, x.get_device_index());
    return y;
}

// A convolution's arguments, checked, and what describes them. Tensors that had to be made contiguous live in here.
// Maps and results are flattened: (batch, height * width, channels), and the latter with two directions
// (batch, 2, out_height * out_width, channels).
class ConvArguments {
  public:
    ConvArguments(const Tensor& given, const std::vector<int64_t>& size, const Tensor& given_weight,
                  const OptionalTensor& given_bias, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool replicate,
                  bool residual, bool silu)
        : x(given.dim() == 3 && given.stride(2) == 1 ? given : dense(given)), weight(dense(given_weight)) {
        STD_TORCH_CHECK(
            x.dim() == 3 && size.size() == 2 && size[0] >= 0 && size[1] >= 0 && size[0] * size[1] == x.size(1),
            "x must be (batch, height, width, channels), flattened to (batch, height * width, channels)");
        STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                        "stride and dilation take two numbers, padding four");
        STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && padding[0] >= 0 &&
                            padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                        "stride and dilation must be positive, padding not negative");
        const int64_t dims = weight.dim(), channels = x.size(2);
        check_device(weight, "weight", x, "x");
        STD_TORCH_CHECK((dims == 4 || (dims == 5 && weight.size(0) == 2)) && weight.size(dims - 4) == channels &&
                            weight.size(dims - 3) == 1,
                        "weight must be (channels, 1, kernel height, kernel width), or two of these");
        conv.directions = dims == 5 ? 2 : 1;
        conv.kernel_height = static_cast<int>(weight.size(dims - 2));
        conv.kernel_width = static_cast<int>(weight.size(dims - 1));
        STD_TORCH_CHECK(conv.taps() > 0 && conv.taps() <= cuda::kMostTaps, "kernels of 1 to ", cuda::kMostTaps,
                        " taps are served");
        conv.dtype = scalar_of(x.scalar_type());
        conv.weight_dtype = scalar_of(weight.scalar_type());
        conv.weight = weight.const_data_ptr();
        if (given_bias) {
            bias = dense(*given_bias);
            check_device(*bias, "bias", x, "x");
            STD_TORCH_CHECK(bias->numel() == conv.directions * channels && bias->scalar_type() == weight.scalar_type(),
                            "bias must be one number per channel, of the dtype of weight");
            conv.bias = bias->const_data_ptr();
        }
        conv.x = x.const_data_ptr();
        conv.image_stride = x.stride(0);
        conv.column_stride = x.size(1) == 1 ? channels : x.stride(1);  // of one position torch may have any
        conv.row_stride = size[1] * conv.column_stride;
        conv.batch = x.size(0);
        conv.height = size[0];
        conv.width = size[1];
        conv.channels = channels;
        conv.stride_height = static_cast<int>(stride[0]);
        conv.stride_width = static_cast<int>(stride[1]);
        conv.dilation_height = static_cast<int>(dilation[0]);
        conv.dilation_width = static_cast<int>(dilation[1]);
        conv.top = static_cast<int>(padding[0]);
        conv.left = static_cast<int>(padding[2]);
        conv.replicate = replicate;
        conv.residual = residual;
        conv.silu = silu;
        const int64_t free_height = conv.height + padding[0] + padding[1] - dilation[0] * (conv.kernel_height - 1) - 1;
        const int64_t free_width = conv.width + padding[2] + padding[3] - dilation[1] * (conv.kernel_width - 1) - 1;
        STD_TORCH_CHECK(conv.height > 0 && conv.width > 0 && channels > 0 && free_height >= 0 && free_width >= 0,
                        "the kernel is larger than the padded map");
        conv.out_height = free_height / stride[0] + 1;
        conv.out_width = free_width / stride[1] + 1;
        const bool unit = stride[0] == 1 && stride[1] == 1;
        STD_TORCH_CHECK(!replicate || unit, "replicated borders are served for unit strides");
        STD_TORCH_CHECK(
            !residual || (unit && conv.directions == 1 && centred(conv.kernel_height, 0, padding, dilation) &&
                          centred(conv.kernel_width, 1, padding, dilation)),
            "a residual convolution must keep the map's size and look the same distance each way");
        STD_TORCH_CHECK(conv.column_stride < cuda::kMostColumnStride && channels < cuda::kMostColumnStride,
                        "columns of fewer than ", cuda::kMostColumnStride, " elements are served");
        STD_TORCH_CHECK(conv.batch * std::max(conv.height * conv.width, conv.out_height * conv.out_width) < (1LL << 31),
                        "maps of fewer than 2^31 positions are served");
    }

    std::vector<int64_t> output_sizes() const {
        const int64_t positions = conv.out_height * conv.out_width;
        if (conv.directions == 1) return {conv.batch, positions, conv.channels};
        return {conv.batch, conv.directions, positions, conv.channels};
    }

    // In memory one direction's maps follow the other's, so that each can be multiplied by a matrix of its own as it
    // lies.
    Tensor new_output() const {
        std::vector<int64_t> sizes = output_sizes();
        if (conv.directions == 1) return new_tensor(x, sizes, x.scalar_type());
        std::swap(sizes[0], sizes[1]);
        return torch::stable::transpose(new_tensor(x, sizes, x.scalar_type()), 0, 1);
    }

    DepthwiseConv conv;
    Tensor x, weight;
    OptionalTensor bias;

  private:
    static bool centred(int kernel, int axis, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation) {
        return kernel % 2 == 1 && padding[2 * axis] == padding[2 * axis + 1] &&
               padding[2 * axis] == dilation[axis] * (kernel / 2);
    }
};

Tensor depthwise_conv(Tensor x, std::vector<int64_t> size, Tensor weight, OptionalTensor bias,
                      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      bool replicate, bool residual, bool silu) {
    const ConvArguments arguments(x, size, weight, bias, stride, padding, dilation, replicate, residual, silu);
    Tensor y = arguments.new_output();
    cuda::depthwise_conv_forward(arguments.conv, y.mutable_data_ptr(), x.get_device_index());
    return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_backward(Tensor grad, Tensor x, std::vector<int64_t> size,
                                                           Tensor weight, OptionalTensor bias,
                                                           std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                           std::vector<int64_t> dilation, bool replicate, bool residual,
                                                           bool silu) {
    const ConvArguments arguments(x, size, weight, bias, stride, padding, dilation, replicate, residual, silu);
    const DepthwiseConv& conv = arguments.conv;
    check_device(grad, "grad", x, "x");
    STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && same_sizes(grad, arguments.output_sizes()),
                    "grad must have the shape and dtype of the result");
    const int64_t dims = grad.dim();
    const bool served = grad.stride(dims - 1) == 1 && grad.stride(dims - 2) < cuda::kMostColumnStride;
    const Tensor dy = served ? grad : dense(grad);
    const cuda::ConvGrad dy_rows{dy.const_data_ptr(), dy.stride(0), dims == 4 ? dy.stride(1) : 0,
                                 conv.out_width * dy.stride(dims - 2), dy.stride(dims - 2)};
    Tensor dz = new_tensor(x, silu ? arguments.output_sizes() : std::vector<int64_t>{0}, x.scalar_type());
    Tensor dx = new_tensor(x, sizes_of(x), x.scalar_type());
    Tensor dweight = gradient_for(weight, weight), dbias = gradient_for(bias, weight);
    const int device = x.get_device_index();
    Tensor workspace = new_tensor(x, {cuda::depthwise_conv_backward_workspace(conv, device)}, ScalarType::Byte);
    cuda::depthwise_conv_backward(conv, dy_rows, dz.mutable_data_ptr(), dx.mutable_data_ptr(),
                                  dweight.mutable_data_ptr(), bias ? dbias.mutable_data_ptr() : nullptr,
                                  workspace.mutable_data_ptr(), device);
    return {dx, dweight, dbias};
}
#endif

}  // namespace vmamba

// The schemas are defined in vmamba/ops (schema.py), beside the fake implementations and the autograd formulas.
STABLE_TORCH_LIBRARY_IMPL(vmamba, CPU, m) {
    m.impl("selective_scan", TORCH_BOX(&vmamba::forward<vmamba::kCpu>));
    m.impl("selective_scan_forward", TORCH_BOX(&vmamba::forward<vmamba::kCpu>));
    m.impl("selective_scan_backward", TORCH_BOX(&vmamba::backward<vmamba::kCpu>));
}

STABLE_TORCH_LIBRARY_IMPL(vmamba, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&vmamba::cpu::isa)); }

#ifdef VMAMBA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vmamba, CUDA, m) {
    m.impl("selective_scan", TORCH_BOX(&vmamba::forward_on_gpu));
    m.impl("selective_scan_forward", TORCH_BOX(&vmamba::forward_on_gpu));
    m.impl("selective_scan_backward", TORCH_BOX(&vmamba::backward<vmamba::kCuda>));
    m.impl("selective_scan_rows_backward", TORCH_BOX(&vmamba::rows_backward));
    m.impl("layer_norm", TORCH_BOX(&vmamba::layer_norm));
    m.impl("layer_norm_forward", TORCH_BOX(&vmamba::layer_norm_forward));
    m.impl("layer_norm_backward", TORCH_BOX(&vmamba::layer_norm_backward));
    m.impl("add_layer_norm", TORCH_BOX(&vmamba::add_layer_norm));
    m.impl("add_layer_norm_backward", TORCH_BOX(&vmamba::add_layer_norm_backward));
    m.impl("gelu", TORCH_BOX(&vmamba::gelu_with_bias));
    m.impl("gelu_forward", TORCH_BOX(&vmamba::gelu));
    m.impl("gelu_backward", TORCH_BOX(&vmamba::gelu_backward));
    m.impl("mlp", TORCH_BOX(&vmamba::mlp));
    m.impl("mlp_forward", TORCH_BOX(&vmamba::mlp));
    m.impl("mlp_backward", TORCH_BOX(&vmamba::mlp_backward));
    m.impl("mlp_residual", TORCH_BOX(&vmamba::mlp_residual));
    m.impl("norm_linear", TORCH_BOX(&vmamba::norm_linear));
    m.impl("conv_norm_gelu", TORCH_BOX(&vmamba::conv_norm_gelu));
    m.impl("depthwise_conv", TORCH_BOX(&vmamba::depthwise_conv));
    m.impl("depthwise_conv_forward", TORCH_BOX(&vmamba::depthwise_conv));
    m.impl("depthwise_conv_backward", TORCH_BOX(&vmamba::depthwise_conv_backward));
}
#endif

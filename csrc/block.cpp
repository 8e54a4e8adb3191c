// A block of VMamba, forward and backward: the operators and products it is made of, called one after the other. Each
// of them takes Python and autograd longer to call than most of them take a GPU.
#ifdef VMAMBA_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/block_weights.h"
#include "operators.h"

namespace vmamba {
namespace {

using Tensors = std::vector<Tensor>;

// ---------------------------------------------------------------------------------------------------------------------
// Products. Maps are dense, (batch, positions, channels); as a matrix they are (rows, channels).
// ---------------------------------------------------------------------------------------------------------------------

Tensor map_of(const Tensor& x, int64_t batch) {
    const int64_t channels = x.size(x.dim() - 1), positions = x.numel() / (batch * channels);
    return strided(x, {batch, positions, channels}, {positions * channels, channels, 1});
}

Tensor image_of(const Tensor& map, const Tensor& like) {
    const int64_t height = like.size(1), width = like.size(2), channels = like.size(3);
    return strided(map, {like.size(0), height, width, channels},
                   {height * width * channels, width * channels, channels, 1});
}

// (batch, positions, K, features)
Tensor by_direction(const Tensor& params, int64_t directions) {
    const int64_t positions = params.size(1), width = params.size(2), features = width / directions;
    return strided(params, {params.size(0), positions, directions, features}, {positions * width, width, features, 1});
}

Tensor matrix(const Tensor& x) {
    const int64_t channels = x.size(x.dim() - 1);
    return strided(x, {x.numel() / channels, channels}, {channels, 1});
}

Tensor transposed(const Tensor& x) {
    const int64_t channels = x.size(x.dim() - 1);
    return strided(x, {channels, x.numel() / channels}, {1, channels});
}

Tensor map_like(const Tensor& x, int64_t channels) {
    return new_tensor(x, {x.size(0), x.size(1), channels}, x.scalar_type());
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
    Tensor y = map_like(x, weight.size(0));
    const Tensor out = matrix(y), rows = matrix(x), columns = transposed(weight);
    if (bias) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), bias->get(), rows.get(), columns.get(), 1.0, 1.0));
    } else {
        TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), rows.get(), columns.get()));
    }
    return y;
}

Tensor gradient_of_input(const Tensor& grad, const Tensor& weight) {
    Tensor dx = map_like(grad, weight.size(1));
    const Tensor out = matrix(dx), rows = matrix(grad);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), rows.get(), weight.get()));
    return dx;
}

// The sums as they are, in float32: not rounded to 16 bits on the way to a weight of 32.
Tensor gradient_of_weight(const Tensor& grad, const Tensor& x) {
    const Tensor rows = transposed(grad), columns = matrix(x);
    std::array<StableIValue, 3> stack{torch::stable::detail::from(rows), torch::stable::detail::from(columns),
                                      torch::stable::detail::from(ScalarType::Float)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor gradient_of_bias(const Tensor& grad) {
    const std::array<int64_t, 1> rows{0};
    return torch::stable::sum(matrix(grad), torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), rows.size()), false,
                              ScalarType::Float);
}

Tensor times(const Tensor& x, const Tensor& factor) {
    std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(factor)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// Stochastic depth: a factor for each image.
Tensor dropped(const Tensor& branch, const OptionalTensor& factors) {
    return factors ? times(branch, *factors) : branch;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a block has, and what its forward keeps
// ---------------------------------------------------------------------------------------------------------------------

template <typename Named, size_t count>
Tensors in_order(const Named& named, Tensor Named::* const (&members)[count]) {
    Tensors tensors;
    tensors.reserve(count + 2);
    for (const auto member : members) tensors.push_back(named.*member);
    return tensors;
}

template <typename Named, size_t count>
Named by_name(const Tensors& tensors, Tensor Named::* const (&members)[count]) {
    STD_TORCH_CHECK(tensors.size() >= count, "a block takes ", count, " tensors of this kind, got ", tensors.size());
    Named named;
    for (size_t i = 0; i < count; ++i) named.*members[i] = tensors[i];
    return named;
}

// In float32; also their gradients.
struct Weights {
    Tensor norm1_weight, norm1_bias, in_proj, conv, x_proj, A_log, D, dt_weight, dt_bias, out_norm_weight,
        out_norm_bias, out_proj, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};
constexpr Tensor Weights::* kWeights[] = {
    &Weights::norm1_weight,
    &Weights::norm1_bias,
    &Weights::in_proj,
    &Weights::conv,
    &Weights::x_proj,
    &Weights::A_log,
    &Weights::D,
    &Weights::dt_weight,
    &Weights::dt_bias,
    &Weights::out_norm_weight,
    &Weights::out_norm_bias,
    &Weights::out_proj,
    &Weights::norm2_weight,
    &Weights::norm2_bias,
    &Weights::fc1_weight,
    &Weights::fc1_bias,
    &Weights::fc2_weight,
    &Weights::fc2_bias,
};

// total1 is the stream behind the branch that is added first, total2 behind the mixer. hidden and active, before and
// behind GELU, are not kept by the fused MLP.
struct Kept {
    Tensor total2, total1, normed1, mean1, rstd1, inner, u, params, checkpoints, y, normed_y, mean_y, rstd_y, normed2,
        mean2, rstd2, in_proj, x_proj, out_proj, fc1, fc2, A;
    OptionalTensor hidden, active;
};
constexpr Tensor Kept::* kKept[] = {
    &Kept::total2,   &Kept::total1,  &Kept::normed1,     &Kept::mean1, &Kept::rstd1,    &Kept::inner,
    &Kept::u,        &Kept::params,  &Kept::checkpoints, &Kept::y,     &Kept::normed_y, &Kept::mean_y,
    &Kept::rstd_y,   &Kept::normed2, &Kept::mean2,       &Kept::rstd2, &Kept::in_proj,  &Kept::x_proj,
    &Kept::out_proj, &Kept::fc1,     &Kept::fc2,         &Kept::A,
};

Tensors in_order(const Kept& kept) {
    Tensors tensors = in_order(kept, kKept);
    if (kept.hidden) tensors.insert(tensors.end(), {*kept.hidden, *kept.active});
    return tensors;
}

Kept kept_of(const Tensors& tensors) {
    Kept kept = by_name(tensors, kKept);
    if (tensors.size() == std::size(kKept) + 2) {
        kept.hidden = tensors[std::size(kKept)];
        kept.active = tensors[std::size(kKept) + 1];
    }
    return kept;
}

Weights weights_of(const Tensors& tensors, const Tensor& x) {
    for (const Tensor& weight : tensors) {
        check_device(weight, "a weight", x, "x");
        STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
                        "the weights of a block must be contiguous and float32");
    }
    const Weights weights = by_name(tensors, kWeights);
    STD_TORCH_CHECK(weights.in_proj.dim() == 2 && weights.x_proj.dim() == 2 && weights.out_proj.dim() == 2 &&
                        weights.fc1_weight.dim() == 2 && weights.fc2_weight.dim() == 2 && weights.conv.dim() == 4 &&
                        weights.A_log.dim() == 3 && weights.dt_weight.dim() == 3,
                    "a weight of a block has the wrong number of dimensions");
    return weights;
}

// Casts weights as they are asked for, in one launch.
class Casts {
  public:
    explicit Casts(ScalarType dtype) : dtype_(dtype) { casts_.dtype = scalar_of(dtype); }
    Tensor cast(const Tensor& weight) { return add(weight, dtype_, false); }
    Tensor decay(const Tensor& A_log) { return add(A_log, ScalarType::Float, true); }
    void run(int device) const { cuda::prepare_block_weights(casts_, device); }

  private:
    Tensor add(const Tensor& weight, ScalarType dtype, bool decay) {
        STD_TORCH_CHECK(casts_.size < cuda::BlockWeights::kMost, "too many weights to cast");
        Tensor result = new_tensor(weight, sizes_of(weight), dtype);
        casts_.items[casts_.size++] = {static_cast<const float*>(weight.const_data_ptr()), result.mutable_data_ptr(),
                                       weight.numel(), decay};
        return result;
    }

    ScalarType dtype_;
    cuda::BlockWeights casts_;
};

// The depthwise convolution of a mixer, padded to keep the map's size, with SiLU.
struct MixerConv {
    std::vector<int64_t> size, stride{1, 1}, padding, dilation{1, 1};

    MixerConv(const Tensor& x, const Tensor& weight)
        : size{x.size(1), x.size(2)},
          padding{weight.size(2) / 2, weight.size(2) / 2, weight.size(3) / 2, weight.size(3) / 2} {}
    Tensor forward(const Tensor& x, const Tensor& weight) const {
        return depthwise_conv(x, size, weight, std::nullopt, stride, padding, dilation, false, false, true);
    }
    std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight) const {
        return depthwise_conv_backward(grad, x, size, weight, std::nullopt, stride, padding, dilation, false, false,
                                       true);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// Three norms, and what is between them. Without a backward to come, each map is freed as soon as it has been read.
class Forward {
  public:
    Forward(const Tensor& x, const Tensors& weights, const Tensor& route, const std::vector<double>& eps,
            ScalarType dtype, int64_t checkpoint_steps, bool fused_mlp)
        : weights_(weights_of(weights, x)),
          route_(route),
          conv_(x, weights_.conv),
          eps_(eps),
          dtype_(dtype),
          checkpoint_steps_(checkpoint_steps),
          keep_(checkpoint_steps > 0),
          fused_mlp_(fused_mlp) {
        STD_TORCH_CHECK(route.dim() == 2, "route must be (K, T)");
        STD_TORCH_CHECK(eps.size() == 3, "a block has three norms, got ", eps.size(), " eps");
        STD_TORCH_CHECK(scalar_of(dtype) != Scalar::f32, "a block computes in bfloat16 or float16");
        Casts casts(dtype);
        kept.in_proj = casts.cast(weights_.in_proj);
        kept.x_proj = casts.cast(weights_.x_proj);
        kept.out_proj = casts.cast(weights_.out_proj);
        kept.fc1 = casts.cast(weights_.fc1_weight);
        kept.fc2 = casts.cast(weights_.fc2_weight);
        kept.A = casts.decay(weights_.A_log);
        if (!fused_mlp) {
            fc1_bias_ = casts.cast(weights_.fc1_bias);
            fc2_bias_ = casts.cast(weights_.fc2_bias);
        }
        casts.run(x.get_device_index());
    }

    // From the stream, and the branch that is to be added to it first.
    void norm1(const Tensor& x, const OptionalTensor& branch) {
        const Tensor sum =
            norm(x, branch, weights_.norm1_weight, weights_.norm1_bias, eps_[0], kept.normed1, kept.mean1, kept.rstd1);
        kept.total1 = branch ? sum : x;
    }

    void norm2(const Tensor& branch) {
        kept.total2 = norm(kept.total1, branch, weights_.norm2_weight, weights_.norm2_bias, eps_[2], kept.normed2,
                           kept.mean2, kept.rstd2);
        has_been_read(kept.total1);
    }

    Tensor mix_positions() {
        const int64_t directions = route_.size(0), states = weights_.A_log.size(2), rank = weights_.dt_weight.size(2);
        const int64_t features = rank + 2 * states;
        STD_TORCH_CHECK(weights_.x_proj.size(0) == directions * features, "x_proj must have ", directions, " * ",
                        features, " rows");
        kept.inner = linear(kept.normed1, kept.in_proj);
        has_been_read(kept.normed1);
        kept.u = conv_.forward(kept.inner, weights_.conv);
        has_been_read(kept.inner);
        kept.params = by_direction(linear(kept.u, kept.x_proj), directions);
        const Tensor dt = features_of(kept.params, 0, rank), B = features_of(kept.params, rank, states),
                     C = features_of(kept.params, rank + states, states);
        // Sums could exceed float16.
        const ScalarType sums = dtype_ == ScalarType::BFloat16 ? dtype_ : ScalarType::Float;
        std::tie(kept.y, kept.checkpoints) =
            forward_on_gpu(kept.u, dt, kept.A, B, C, weights_.D, weights_.dt_weight, weights_.dt_bias, route_,
                           std::nullopt, std::nullopt, true, "merged", sums, checkpoint_steps_);
        has_been_read(kept.u);
        has_been_read(kept.params);
        norm(kept.y, std::nullopt, weights_.out_norm_weight, weights_.out_norm_bias, eps_[1], kept.normed_y,
             kept.mean_y, kept.rstd_y);
        has_been_read(kept.y);
        const Tensor result = linear(kept.normed_y, kept.out_proj);
        has_been_read(kept.normed_y);
        return result;
    }

    Tensor mix_channels() {
        if (fused_mlp_) return mlp(kept.normed2, kept.fc1, weights_.fc1_bias, kept.fc2, weights_.fc2_bias);
        kept.hidden = linear(kept.normed2, kept.fc1, fc1_bias_);
        has_been_read(kept.normed2);
        kept.active = gelu(*kept.hidden);
        has_been_read(*kept.hidden);
        return linear(*kept.active, kept.fc2, fc2_bias_);
    }

    Kept kept;

  private:
    Tensor norm(const Tensor& x, const OptionalTensor& branch, const Tensor& weight, const Tensor& bias, double eps,
                Tensor& y, Tensor& mean, Tensor& rstd) const {
        const NormResult result = run_layer_norm(x, branch, weight, bias, eps, dtype_, keep_);
        y = result.y;
        mean = result.mean;
        rstd = result.rstd;
        return result.sum;
    }
    void has_been_read(Tensor& map) const {
        if (!keep_) map = Tensor();
    }

    Weights weights_;
    Tensor route_;
    MixerConv conv_;
    std::vector<double> eps_;
    ScalarType dtype_;
    int64_t checkpoint_steps_;
    bool keep_, fused_mlp_;
    OptionalTensor fc1_bias_, fc2_bias_;
};

}  // namespace

// Returns the branch that is still to be added, the stream, and with checkpoints what else the backward takes.
Tensors block_forward(Tensor x, OptionalTensor branch, Tensors weights, Tensor route, OptionalTensor factors1,
                      OptionalTensor factors2, std::vector<double> eps, ScalarType dtype, int64_t checkpoint_steps,
                      bool fused_mlp) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (batch, height, width, channels)");
    Forward block(x, weights, route, eps, dtype, checkpoint_steps, fused_mlp);
    if (branch) branch = map_of(dense(*branch), x.size(0));
    block.norm1(map_of(dense(x), x.size(0)), branch);
    block.norm2(dropped(block.mix_positions(), factors1));
    const Tensor result = dropped(block.mix_channels(), factors2);

    Kept& kept = block.kept;
    kept.total2 = image_of(kept.total2, x);
    if (!branch) kept.total1 = kept.total2;  // the caller has x, and a result is not an argument
    Tensors results{image_of(result, x)};
    const Tensors others = checkpoint_steps > 0 ? in_order(kept) : Tensors{kept.total2};
    results.insert(results.end(), others.begin(), others.end());
    return results;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// Returns the gradients of the weights, of x, and where it had one of the branch.
Tensors block_backward(Tensor grad_total, Tensor given_grad, Tensors given_kept, Tensors given_weights, Tensor route,
                       OptionalTensor factors1, OptionalTensor factors2, bool had_branch, int64_t checkpoint_steps) {
    const Weights weights = weights_of(given_weights, given_grad);
    const Kept kept = kept_of(given_kept);
    STD_TORCH_CHECK(given_grad.dim() == 4 && same_sizes(grad_total, sizes_of(given_grad)) &&
                        same_sizes(kept.total2, sizes_of(given_grad)),
                    "the gradients must have the shape of the results");
    const int64_t batch = given_grad.size(0);
    const MixerConv conv(given_grad, weights.conv);
    const Tensor grad = dropped(map_of(dense(given_grad), batch), factors2);
    Weights d;

    Tensor dnormed2;
    if (kept.hidden) {
        d.fc2_weight = gradient_of_weight(grad, *kept.active);
        Tensor dhidden;
        std::tie(dhidden, d.fc1_bias) = gelu_backward(gradient_of_input(grad, kept.fc2), *kept.hidden);
        d.fc1_weight = gradient_of_weight(dhidden, kept.normed2);
        dnormed2 = gradient_of_input(dhidden, kept.fc1);
    } else {
        Tensor active, dhidden;
        std::tie(dnormed2, active, dhidden, d.fc1_bias) = mlp_backward(
            grad, kept.normed2, kept.fc1, dense(transposed(kept.fc1)), weights.fc1_bias, dense(transposed(kept.fc2)));
        d.fc2_weight = gradient_of_weight(grad, active);
        d.fc1_weight = gradient_of_weight(dhidden, kept.normed2);
    }
    d.fc2_bias = gradient_of_bias(grad);

    Tensor dtotal1, dmixed;
    std::tie(dtotal1, dmixed, d.norm2_weight, d.norm2_bias) =
        run_layer_norm_backward(dnormed2, map_of(dense(grad_total), batch), map_of(kept.total2, batch),
                                weights.norm2_weight, kept.mean2, kept.rstd2);
    dmixed = dropped(dmixed, factors1);
    d.out_proj = gradient_of_weight(dmixed, kept.normed_y);
    const auto [dy, no_branch, dout_norm_weight, dout_norm_bias] =
        run_layer_norm_backward(gradient_of_input(dmixed, kept.out_proj), std::nullopt, kept.y, weights.out_norm_weight,
                                kept.mean_y, kept.rstd_y);
    d.out_norm_weight = dout_norm_weight;
    d.out_norm_bias = dout_norm_bias;
    auto [du, dparams, dA, dD, ddt_weight, ddt_bias] =
        rows_backward(dy, kept.checkpoints, kept.u, kept.params, kept.A, weights.D, weights.dt_weight, weights.dt_bias,
                      route, "merged", checkpoint_steps);
    d.A_log = times(dA, kept.A);
    d.D = dD;
    d.dt_weight = ddt_weight;
    d.dt_bias = ddt_bias;
    const int64_t features = kept.x_proj.size(0);
    const Tensor rows = strided(dparams, {batch, dparams.size(1), features}, {dparams.size(1) * features, features, 1});
    d.x_proj = gradient_of_weight(rows, kept.u);
    const Tensor sum = matrix(du), projected = matrix(rows);
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(sum.get(), sum.get(), projected.get(), kept.x_proj.get(), 1.0, 1.0));
    const auto [dinner, dconv, no_bias] = conv.backward(du, kept.inner, weights.conv);
    d.conv = dconv;
    d.in_proj = gradient_of_weight(dinner, kept.normed1);

    const auto [dx, dbranch, dnorm1_weight, dnorm1_bias] =
        run_layer_norm_backward(gradient_of_input(dinner, kept.in_proj), dtotal1, map_of(dense(kept.total1), batch),
                                weights.norm1_weight, kept.mean1, kept.rstd1);
    d.norm1_weight = dnorm1_weight;
    d.norm1_bias = dnorm1_bias;
    Tensors gradients = in_order(d, kWeights);
    gradients.push_back(image_of(dx, given_grad));
    if (had_branch) gradients.push_back(image_of(dbranch, given_grad));
    return gradients;
}

}  // namespace vmamba

STABLE_TORCH_LIBRARY_IMPL(vmamba, CUDA, m) {
    m.impl("block_forward", TORCH_BOX(&vmamba::block_forward));
    m.impl("block_backward", TORCH_BOX(&vmamba::block_backward));
}
#endif

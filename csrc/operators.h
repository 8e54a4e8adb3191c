// Operators of registration.cpp, for one that is made of several of them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "scan.h"

namespace vmamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Scalar scalar_of(ScalarType type);
std::vector<int64_t> sizes_of(const Tensor& x);
bool same_sizes(const Tensor& x, const std::vector<int64_t>& sizes);
Tensor dense(const Tensor& x);
// A view of what x is a view of, that many numbers behind x.
Tensor strided(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
               int64_t offset = 0);
// Some of the features of every direction, of params (batch, L, K, features).
Tensor features_of(const Tensor& params, int64_t first, int64_t count);
Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype);
void check_device(const Tensor& x, const char* name, const Tensor& map, const char* map_name);

// What a call of a norm's forward gives; statistics and the sum only where they are asked for.
struct NormResult {
    Tensor y, sum, mean, rstd;
};
NormResult run_layer_norm(const Tensor& x, const OptionalTensor& branch, const Tensor& weight, const Tensor& bias,
                          double eps, ScalarType out_dtype, bool with_statistics);
// Gradients of the sum, of the branch where there is a gradient of the sum beside that of the norm, weight and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_layer_norm_backward(const Tensor& grad, const OptionalTensor& grad_sum,
                                                                   const Tensor& x, const Tensor& weight,
                                                                   const Tensor& mean, const Tensor& rstd);

// The scan on a GPU, and its backward where dt, B and C are parts of the rows of `params`.
std::tuple<Tensor, Tensor> forward_on_gpu(Tensor u, Tensor dt, Tensor A, Tensor B, OptionalTensor C, OptionalTensor D,
                                          OptionalTensor dt_weight, OptionalTensor dt_bias, Tensor route,
                                          OptionalTensor param_route, OptionalTensor reset, bool dt_softplus,
                                          std::string result, ScalarType out_dtype, int64_t checkpoint_steps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rows_backward(Tensor grad, Tensor checkpoints, Tensor u,
                                                                         Tensor params, Tensor A, Tensor D,
                                                                         Tensor dt_weight, Tensor dt_bias, Tensor route,
                                                                         std::string result, int64_t checkpoint_steps);

Tensor depthwise_conv(Tensor x, std::vector<int64_t> size, Tensor weight, OptionalTensor bias,
                      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      bool replicate, bool residual, bool silu);
std::tuple<Tensor, Tensor, Tensor> depthwise_conv_backward(Tensor grad, Tensor x, std::vector<int64_t> size,
                                                           Tensor weight, OptionalTensor bias,
                                                           std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                           std::vector<int64_t> dilation, bool replicate, bool residual,
                                                           bool silu);

Tensor gelu(Tensor x);
std::tuple<Tensor, Tensor> gelu_backward(Tensor grad, Tensor x);
Tensor mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2);
std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_backward(Tensor grad, Tensor x, Tensor weight1, Tensor weight1_t,
                                                        Tensor bias1, Tensor weight2_t);

}  // namespace vmamba

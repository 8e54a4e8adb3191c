"""The signatures of the registered operators in PyTorch's schema language; csrc/registration.cpp implements them."""

_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor? C, Tensor? D, Tensor? dt_weight, Tensor? dt_bias, "
    "Tensor route, Tensor? param_route, Tensor? reset, bool dt_softplus, str result"
)
FORWARD = f"({_INPUTS}, ScalarType out_dtype, int checkpoint_steps) -> (Tensor, Tensor)"
BACKWARD = (
    f"(Tensor grad, Tensor checkpoints, {_INPUTS}, int checkpoint_steps) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
CPU_ISA = "() -> str"

PROJECTED_SCAN = (
    "(Tensor u, Tensor weight, Tensor A, Tensor D, Tensor dt_weight, Tensor dt_bias, Tensor route, str result, "
    "ScalarType out_dtype, int checkpoint_steps) -> (Tensor, Tensor, Tensor)"
)
"""The result, the checkpoints, and the parameters (batch, L, K, R + 2N) that were projected."""
_ROWS = (
    "Tensor grad, Tensor checkpoints, Tensor u, Tensor params, {weight}Tensor A, Tensor D, Tensor dt_weight, "
    "Tensor dt_bias, Tensor route, str result, int checkpoint_steps"
)
ROWS_BACKWARD = f"({_ROWS.format(weight='')}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
"""Gradients of u, params, A, D, dt_weight and dt_bias."""
PROJECTED_SCAN_BACKWARD = (
    f"({_ROWS.format(weight='Tensor weight, ')}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
"""Gradients of u, weight, A, D, dt_weight and dt_bias."""

FORWARD_OPS = ("selective_scan", "selective_scan_forward")
"""Differentiable, and without autograd; the same kernel."""

LAYER_NORM = "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)"
LAYER_NORM_FORWARD = "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) -> Tensor"
LAYER_NORM_BACKWARD = "(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)"
ADD_LAYER_NORM = (
    "(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
ADD_LAYER_NORM_BACKWARD = (
    "(Tensor grad_sum, Tensor grad, Tensor sum, Tensor weight, Tensor mean, Tensor rstd) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)

GELU = "(Tensor x, Tensor bias) -> Tensor"
GELU_FORWARD = "(Tensor x) -> Tensor"
GELU_BACKWARD = "(Tensor grad, Tensor x) -> (Tensor, Tensor)"
"""The second is the gradient of the bias, which is in x already."""

MLP = "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> Tensor"
MLP_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor weight1, Tensor weight1_t, Tensor bias1, Tensor weight2_t) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
"""Gradient of x, what is hidden behind GELU, the gradient of what is hidden before it, and its sums over positions."""
MLP_RESIDUAL = (
    "(Tensor x, Tensor? branch, Tensor? branch_norm_weight, Tensor? branch_norm_bias, float branch_eps, "
    "Tensor? projection, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight1, Tensor bias1, "
    "Tensor weight2, Tensor bias2) -> Tensor"
)

NORM_LINEAR = "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight) -> Tensor"

CONV_NORM_GELU = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, int stride, "
    "ScalarType out_dtype) -> Tensor"
)

_CONV = (
    "Tensor x, SymInt[] size, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "bool replicate, bool residual, bool silu"
)
DEPTHWISE_CONV = f"({_CONV}) -> Tensor"
DEPTHWISE_CONV_BACKWARD = f"(Tensor grad, {_CONV}) -> (Tensor, Tensor, Tensor)"

BLOCK_FORWARD = (
    "(Tensor x, Tensor? branch, Tensor[] weights, Tensor route, Tensor? factors1, Tensor? factors2, float[] eps, "
    "ScalarType dtype, int checkpoint_steps, bool fused_mlp) -> Tensor[]"
)
"""The branch that is still to be added, the stream, and with checkpoints what else the backward takes."""
BLOCK_BACKWARD = (
    "(Tensor grad_total, Tensor grad_branch, Tensor[] kept, Tensor[] weights, Tensor route, Tensor? factors1, "
    "Tensor? factors2, bool had_branch, int checkpoint_steps) -> Tensor[]"
)
"""Gradients of the weights, of x and, where there was one, of the branch."""

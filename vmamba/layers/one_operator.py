"""A block in eager mode on a GPU: as one operator where nobody can tell."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.layers.conv import DepthwiseConv2d
from vmamba.layers.mlp import Mlp
from vmamba.layers.norm import BranchNorm, ScanNorm
from vmamba.layers.plain import drops_nothing, is_plain, is_plain_linear, names_calls
from vmamba.layers.ss2d import SS2D
from vmamba.layers.ssm import SelectiveSSM
from vmamba.ops import get_route, recording
from vmamba.ops.block import BlockSettings, BlockWeights, block, serves_block
from vmamba.ops.layer_norm import serves_channels
from vmamba.ops.mlp import serves_mlp

_PACK = 8  # numbers of 16 bits that a product or a kernel reads at a time


def in_one_operator(layer: Any, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """``layer.branches(x, branch)`` by :func:`vmamba.ops.block.block`.

    Args:
        layer: A :class:`vmamba.layers.PreNormBlock`.
        x: What it is called with, (batch, height, width, dim).
        branch: What is still to be added to that; None for nothing.

    Returns:
        None where the operator does not serve, or somebody could tell that the layers were not called.
    """
    if _shows_operators(x) or not (serves_block(x, branch) and _is_plain_block(layer)):
        return None
    weights = _weights(layer)
    if not (_are_its_own(weights) and _has_geometry(layer, weights)):
        return None
    dtype = torch.get_autocast_dtype(x.device.type)
    settings = BlockSettings(
        get_route(layer.mixer.route, x.shape[1], x.shape[2], x.device),
        (_factors(layer.drop_path, x, dtype), _factors(layer.drop_path, x, dtype)),
        (layer.norm1.eps, layer.mixer.out_norm.eps, layer.norm2.eps),
        dtype,
        serves_mlp(x, *layer.mlp.weights()),
    )
    return block(settings, x, branch, weights)


def _shows_operators(x: Tensor) -> bool:
    """Whether a graph or a list of the operators is being made, or of their scans."""
    return (
        torch.compiler.is_compiling()
        or names_calls(x)
        or torch._C._len_torch_dispatch_stack() > 0
        or recording.is_recording()
    )


def _is_plain_block(layer: Any) -> bool:
    mixer, mlp = layer.mixer, layer.mlp
    return (
        is_plain(mixer, SS2D)
        and is_plain(mlp, Mlp)
        and is_plain(layer.norm1, BranchNorm)
        and is_plain(layer.norm2, BranchNorm)
        and (is_plain(layer.drop_path, nn.Identity) or is_plain(layer.drop_path, DropPath))
        and is_plain(mixer.conv, DepthwiseConv2d)
        and is_plain(mixer.ssm, SelectiveSSM)
        and is_plain(mixer.out_norm, ScanNorm)
        and is_plain_linear(mixer.in_proj)
        and is_plain_linear(mixer.out_proj)
        and mixer.ssm.projects_plainly()
        and mlp.begins_plainly()
        and mlp.ends_plainly()
    )


def _weights(layer: Any) -> BlockWeights:
    mixer = layer.mixer
    norm1, ssm, out_norm, norm2 = layer.norm1, mixer.ssm, mixer.out_norm, layer.norm2
    return BlockWeights(
        norm1.weight,
        norm1.bias,
        mixer.in_proj.weight,
        mixer.conv.weight,
        ssm.x_proj.weight,
        ssm.A_log,
        ssm.D,
        ssm.dt_weight,
        ssm.dt_bias,
        out_norm.weight,
        out_norm.bias,
        mixer.out_proj.weight,
        norm2.weight,
        norm2.bias,
        *layer.mlp.weights(),
    )


def _are_its_own(weights: BlockWeights) -> bool:
    """Whether the operator takes these weights, none is made from others, and no gradient is computed in vain."""
    training = torch.is_grad_enabled()
    return all(
        type(weight) is nn.Parameter
        and (weight.requires_grad or not training)
        and weight.dtype is torch.float32
        and weight.is_contiguous()
        for weight in weights
    )


def _has_geometry(layer: Any, weights: BlockWeights) -> bool:
    """Whether there are kernels for a block of these shapes."""
    mixer = layer.mixer
    conv = mixer.conv
    return (
        mixer.in_proj.bias is None
        and mixer.out_proj.bias is None
        and conv.bias is None
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.activation == "silu"
        and not conv.residual
        and serves_channels(weights.norm1_weight.shape[0])
        and serves_channels(weights.out_norm_weight.shape[0])
        and weights.x_proj.shape[0] % _PACK == 0
        and weights.fc1_weight.shape[0] % _PACK == 0
    )


def _factors(drop_path: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What stochastic depth multiplies the images with."""
    return None if drops_nothing(drop_path) else drop_path(x.new_ones((len(x), 1, 1), dtype=dtype))

"""The SS2D core by mamba-ssm's scan, which knows neither routes nor low-rank steps: both are made up for around it."""

from typing import Any

import torch
from torch import Tensor


class MambaSsm:
    """What :class:`scan.Core` computes, on its tensors.

    Args:
        core: With its inputs ``x``, ``A``, ``D``, ``dt_weight``, ``dt_bias``, its ``route`` and ``parameters()``.
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self.order = core.route.long()  # (K, L)
        self.back = torch.argsort(self.order, dim=-1)  # the routes are permutations

    def forward(self) -> Tensor:
        """The merged scan, (batch, L, D) float32."""
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        core = self.core
        dt, B, C = (self._walk(p) for p in core.parameters())  # each (batch, K, L, *)
        steps = torch.einsum("bklr,kdr->bkdl", dt, core.dt_weight.to(dt.dtype))
        walked = core.x[:, self.order].transpose(-1, -2)  # (batch, K, D, L)
        y = selective_scan_fn(
            walked.flatten(1, 2).contiguous(),
            steps.flatten(1, 2).contiguous(),
            core.A.flatten(0, 1),
            B.transpose(-1, -2).contiguous(),
            C.transpose(-1, -2).contiguous(),
            core.D.flatten(),
            delta_bias=core.dt_bias.flatten(),
            delta_softplus=True,
        )
        y = y.unflatten(1, (self.order.shape[0], -1)).transpose(-1, -2)  # (batch, K, L, D)
        index = self.back[None, :, :, None].expand_as(y)
        return y.gather(2, index).sum(1, dtype=torch.float32)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Gradients of the core's leaves."""
        return torch.autograd.grad(self.forward(), self.core.leaves, self.core.grad.float())

    def _walk(self, p: Tensor) -> Tensor:
        """Rows (batch, L, K, n) of each direction in its order: (batch, K, L, n)."""
        p = p.transpose(1, 2)
        return p.gather(2, self.order[None, :, :, None].expand(*p.shape))

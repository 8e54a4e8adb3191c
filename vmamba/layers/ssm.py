"""The parameters of a selective scan, and the scan of a map with them."""

import math
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.layers.plain import is_plain_linear
from vmamba.ops import selective_scan
from vmamba.ops.alignment import aligned_linear
from vmamba.ops.projected_scan import projected_scan, serves_projected_scan
from vmamba.ops.selective_scan import Result

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
"""Step sizes start log-uniform in [DT_MIN, DT_MAX], none below DT_FLOOR."""


def dt_rank(dim: int) -> int:
    """The rank of the step sizes in a block ``dim`` channels wide: one for every sixteen, rounded up."""
    return math.ceil(dim / 16)


def kept_dtype(u: Tensor) -> torch.dtype:
    """What a scan's states, and sums of them, are written in: bfloat16 if ``u`` is; they could exceed float16."""
    return torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32


@register_notrace_module  # how it computes depends on the device
class SelectiveSSM(nn.Module):
    """Input-dependent scan of a map along several directions, each with its own parameters (Mamba's S6).

    Step sizes, B and C are linear in the input at each position, so they commute with the order of the visits: one
    projection of the map as it lies serves all directions, and the scan reads its result in route order.

    Parameters (K directions, D channels, N states, R ranks): ``x_proj.weight`` (K*(R+2N), D) with rows dt, B, C per
    direction; ``dt_weight`` (K, D, R), ``dt_bias`` (K, D), ``A_log`` (K, D, N) and the skip ``D`` (K, D), which are
    created in float32 whatever ``dtype`` is: the recurrence is not stable in less.

    Args:
        dim: Channels D of the scanned map.
        rank: Rank R of the step sizes.
        d_state: States N per channel.
        directions: Directions K, each with parameters of its own.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        d_state: int = 1,
        directions: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.d_state = d_state
        self.directions = directions
        self.x_proj = nn.Linear(dim, directions * (rank + 2 * d_state), bias=False, device=device, dtype=dtype)
        kept: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.dt_weight = nn.Parameter(torch.empty(directions, dim, rank, **kept))
        self.dt_bias = nn.Parameter(torch.empty(directions, dim, **kept))
        self.A_log = nn.Parameter(torch.empty(directions, dim, d_state, **kept))
        self.D = nn.Parameter(torch.empty(directions, dim, **kept))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's initialisation: A = -(1..N), D = 1, softplus(dt_bias) log-uniform, the projections uniform."""
        self.x_proj.reset_parameters()
        self.dt_weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
        span = math.log(DT_MAX) - math.log(DT_MIN)
        dt = torch.exp(torch.rand_like(self.dt_bias) * span + math.log(DT_MIN)).clamp(min=DT_FLOOR)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Low-rank step sizes (batch, L, K, R), B and C (batch, L, K, N) of ``u`` (batch, L, D)."""
        params = aligned_linear(u, self.x_proj.weight) if self.projects_plainly() else self.x_proj(u)
        params = params.unflatten(-1, (self.directions, self.rank + 2 * self.d_state))
        dt, B, C = params.split([self.rank, self.d_state, self.d_state], dim=-1)
        return dt, B, C

    def projects_plainly(self) -> bool:
        """Whether nobody can tell if ``x_proj`` is called, or its weight multiplied with.

        While torch.fx traces a caller of :meth:`project`, weights are of another class, and it is called.
        """
        return is_plain_linear(self.x_proj) and self.x_proj.bias is None

    def forward(self, u: Tensor, route: Tensor, result: Result = "merged") -> Tensor:
        """Scans ``u`` (batch, L, D) along ``route`` (K, T).

        Returns:
            The sum over directions and visits, (batch, L, D), or another ``result`` of
            :func:`vmamba.ops.selective_scan`, in :func:`kept_dtype`.
        """
        A = -torch.exp(self.A_log.float())
        out_dtype = kept_dtype(u)
        if self.projects_plainly():
            weight = self.x_proj.weight
            if serves_projected_scan(u, weight, self.dt_weight, route, result):
                return projected_scan(u, weight, A, self.D, self.dt_weight, self.dt_bias, route, result, out_dtype)
        dt, B, C = self.project(u)
        return selective_scan(
            u,
            dt,
            A,
            B,
            C,
            self.D,
            dt_weight=self.dt_weight,
            dt_bias=self.dt_bias,
            route=route,
            result=result,
            out_dtype=out_dtype,
        )

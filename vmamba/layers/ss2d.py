"""VMamba's mixers: a map, scanned in two dimensions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.layers.conv import DepthwiseConv2d
from vmamba.layers.norm import ScanNorm, norm_of
from vmamba.layers.plain import is_plain, is_plain_linear
from vmamba.layers.ssm import SelectiveSSM, dt_rank
from vmamba.ops import get_route
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.mlp import Projection
from vmamba.ops.positions import by_position


class SS2D(nn.Module):
    """VMamba's mixer: projection, depthwise convolution, SiLU, scan in four directions, projection.

    Maps (batch, height, width, dim) to the same shape.

    Args:
        dim: Channels of the map.
        d_state: States per channel of the scan.
        ssm_ratio: Channels of the scan per channel of the map.
        route: Name of a registered route of four directions.
    """

    streams = 1
    conv_bias = False

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        route: str = "cross",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.route = route
        inner = int(dim * ssm_ratio)
        self.in_proj = nn.Linear(dim, self.streams * inner, bias=False, **dd)
        self.conv = DepthwiseConv2d(inner, bias=self.conv_bias, activation="silu", **dd)
        self.ssm = SelectiveSSM(inner, dt_rank(dim), d_state, directions=4, **dd)
        self.out_norm = ScanNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def scan(self, x: Tensor) -> Tensor:
        """Convolution, SiLU, scan and norm: (batch, height, width, inner) to the same shape."""
        u = self.conv(x)
        return self.out_norm(self._sum(u), u.dtype)

    def _sum(self, u: Tensor) -> Tensor:
        height, width = u.shape[1], u.shape[2]
        y = self.ssm(u.flatten(1, 2), get_route(self.route, height, width, u.device))
        return y.unflatten(1, (height, width))

    def forward(self, x: Tensor) -> Tensor:
        return by_position(self.out_proj, self.scan(by_position(self.in_proj, x)))

    def between(self, x: Tensor) -> Tensor:
        """What :meth:`forward` does between its first projection and the norm before the last one."""
        return self._sum(self.conv(x))

    def end(self, x: Tensor) -> Projection | None:
        """The last norm and projection, for a pass that does more than those.

        None where somebody could tell if the projections were not called, and where the sums of a scan may be too large
        for the dtype of the projection.

        Args:
            x: What the mixer is to be called with, or is computed from.
        """
        plain = (
            is_plain(self, SS2D)
            and is_plain(self.out_norm, ScanNorm)
            and all(is_plain_linear(layer) and layer.bias is None for layer in (self.in_proj, self.out_proj))
            and (autocast_dtype(x) or x.dtype) == torch.bfloat16
        )
        return Projection(norm_of(self.out_norm), self.out_proj.weight) if plain else None


class GatedSS2D(SS2D):
    """The mixer of VMamba's first generation: :class:`SS2D` with a bias in the convolution, its result gated."""

    streams = 2  # what is scanned, and its gate
    conv_bias = True

    def forward(self, x: Tensor) -> Tensor:
        x, z = by_position(lambda x: self.in_proj(x).chunk(2, dim=-1), x)
        return by_position(lambda y, z: self.out_proj(y * F.silu(z)), self.scan(x), z)

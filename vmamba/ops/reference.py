"""The selective scan as a sentence of PyTorch: sequential, in any floating dtype, the definition the kernels obey."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    route: Tensor,
    param_route: Tensor | None = None,
    reset: Tensor | None = None,
    dt_softplus: bool = True,
    result: str = "merged",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Same arguments and results as :func:`vmamba.ops.selective_scan`, computed step by step.

    Float64 inputs are computed in float64, all others in float32. Differentiable in every tensor input.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    batch, length, channels = u.shape[0], u.shape[-2], u.shape[-1]
    visits = _per_image(route, batch)
    param_visits = visits if param_route is None else _per_image(param_route, batch)
    directions, steps = visits.shape[1:]

    def along_route(x: Tensor, positions: Tensor) -> Tensor:
        """(batch, K or 1, L, features) read at the positions (batch, K, T), zero where nothing is read."""
        x = x.to(compute).expand(batch, directions, -1, -1)
        index = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, index) * (positions >= 0).unsqueeze(-1)

    def by_direction(x: Tensor) -> Tensor:
        """(batch, L, K or 1, features) to (batch, K or 1, L, features)."""
        return x.transpose(1, 2)

    u_t = along_route(u.unsqueeze(1) if u.dim() == 3 else u, visits)
    dt_t = along_route(by_direction(dt), param_visits)
    B_t = along_route(by_direction(B), param_visits)
    if dt_weight is not None:
        dt_t = dt_t @ dt_weight.to(compute).transpose(-1, -2)
    if dt_bias is not None:
        dt_t = dt_t + dt_bias.to(compute).unsqueeze(-2)
    if dt_softplus:
        dt_t = F.softplus(dt_t)

    decay = torch.exp(dt_t.unsqueeze(-1) * A.to(compute).unsqueeze(-3))  # (batch, K, T, D, N)
    gain = (dt_t * u_t).unsqueeze(-1) * B_t.unsqueeze(-2)
    if reset is not None:
        decay = decay.masked_fill(_per_image(reset, batch).bool()[..., None, None], 0.0)

    state = u_t.new_zeros(batch, directions, channels, A.shape[-1])
    states = []
    for t in range(steps):
        state = decay[:, :, t] * state + gain[:, :, t]
        states.append(state)
    trajectory = torch.stack(states, dim=2) if states else gain
    if result == "states":
        return trajectory.to(out_dtype)

    assert C is not None
    C_t = along_route(by_direction(C), param_visits)
    y = (trajectory * C_t.unsqueeze(-2)).sum(-1)
    if D is not None:
        y = y + D.to(compute).unsqueeze(-2) * u_t
    y = y * (visits >= 0).unsqueeze(-1)
    if result == "steps":
        return y.to(out_dtype)

    index = visits.clamp(min=0).flatten(1).unsqueeze(-1).expand(-1, -1, channels)
    merged = y.new_zeros(batch, length, channels).scatter_add(1, index, y.flatten(1, 2))
    return merged.to(out_dtype)


def _per_image(table: Tensor, batch: int) -> Tensor:
    """A (K, T) or (batch, K, T) table as int64 of shape (batch, K, T)."""
    table = table.long()
    return table if table.dim() == 3 else table.expand(batch, *table.shape)

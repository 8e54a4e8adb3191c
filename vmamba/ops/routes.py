"""Routes: the order in which a scan visits the positions of a grid.

A route is an int32 tensor of shape (K, T): ``route[k, t]`` is the position ``row * width + column`` that direction
``k`` visits at step ``t``. A position may be visited several times or never, T need not equal height * width, and the
entry :data:`DECAY_ONLY` (-1) stands for a step that reads nothing and only lets the state decay.

Routes are made by small functions of the grid: its positions, as an int32 tensor of shape (height, width). Register one
under a name and every model can use it::

    @register_route("diagonal")
    def diagonal(grid: torch.Tensor) -> torch.Tensor: ...

    route = get_route("diagonal", 14, 14, device)
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache, wraps

import torch
from timm.models import register_notrace_function
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

RouteBuilder = Callable[[Tensor], Tensor]

DECAY_ONLY = -1
"""Route entry of a step that reads no position and writes none: its input is zero and the state only decays."""

_BUILDERS: dict[str, RouteBuilder] = {}


def register_route(name: str) -> Callable[[RouteBuilder], RouteBuilder]:
    """Registers a function under ``name``: from the positions of a grid, (height, width), to a route of shape (K, T).

    Raises:
        ValueError: if the name is taken.
    """

    def register(builder: RouteBuilder) -> RouteBuilder:
        if name in _BUILDERS:
            raise ValueError(f"route '{name}' is registered already; choose another name")

        @wraps(builder)
        def checked(grid: Tensor) -> Tensor:
            route = builder(grid)
            if not _capturing():
                check_route(route, grid.numel())
            return route

        _BUILDERS[name] = checked
        return builder

    return register


def list_routes() -> list[str]:
    """The names of all registered routes, sorted."""
    return sorted(_BUILDERS)


def _capturing() -> bool:
    """Whether torch.compile or torch.export is tracing: tables are then part of its graph, and hold no values yet."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def grid_table(builder: RouteBuilder) -> Callable[..., Tensor]:
    """Makes of a function of the grid's positions one of (height, width, device): a table that goes with a route.

    The result is int32, on the CPU unless said, and cached per size and device. While a graph is being captured it is
    computed inside it instead, on the device, so that sizes may stay symbolic.
    """

    @register_notrace_function
    @wraps(builder)
    def table(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        return _table(builder, height, width, device)

    return table


def _table(builder: RouteBuilder, height: int, width: int, device: torch.device | str) -> Tensor:
    if _capturing():
        return builder(_grid(height, width, device)).to(device=device, dtype=torch.int32)
    return _cached_table(builder, height, width, torch.device(device))


@lru_cache(maxsize=512)
def _cached_table(builder: RouteBuilder, height: int, width: int, device: torch.device) -> Tensor:
    # A cached tensor outlives the mode it was made in: one made under inference_mode could never be used in training.
    with torch.inference_mode(False), torch.device("cpu"):
        return builder(_grid(height, width, "cpu")).to(device=device, dtype=torch.int32).contiguous()


def _grid(height: int, width: int, device: torch.device | str) -> Tensor:
    return torch.arange(height * width, dtype=torch.int32, device=device).view(height, width)


@register_notrace_function
def get_route(name: str, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The route registered under ``name`` for a grid of height x width: int32 of shape (K, T), on ``device``.

    It is cached as every :func:`grid_table` is.

    Raises:
        ValueError: if no route has that name, or its builder returned something that is no route for this grid.
    """
    return _table(_builder(name), height, width, device)


def _builder(name: str) -> RouteBuilder:
    if name not in _BUILDERS:
        near = get_close_matches(name, _BUILDERS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(list_routes())}"
        raise ValueError(f"no route is registered as '{name}'; {hint}")
    return _BUILDERS[name]


def check_route(route: Tensor, length: int) -> None:
    """Raises ValueError unless ``route`` is an integer (K, T) or (batch, K, T) table of entries in [-1, length)."""
    if route.dim() not in (2, 3) or route.is_floating_point():
        raise ValueError(
            f"a route is an integer table of shape (K, T) or (batch, K, T), got {route.dtype} of shape "
            f"{tuple(route.shape)}"
        )
    if route.numel() == 0:
        return
    low, high = int(route.min()), int(route.max())
    if low < DECAY_ONLY or high >= length:
        raise ValueError(f"route entries must lie in [{DECAY_ONLY}, {length}), got {low}..{high}")


def reverse(route: Tensor) -> Tensor:
    """The same visits, last one first."""
    return route.flip(-1)


@register_route("raster")
def raster(grid: Tensor) -> Tensor:
    """Row by row from the top left, one direction: (1, height * width)."""
    return grid.reshape(1, -1)


@register_route("columns")
def columns(grid: Tensor) -> Tensor:
    """Column by column from the top left, one direction: (1, height * width)."""
    return raster(grid.t())


@register_route("bidirectional")
def bidirectional(grid: Tensor) -> Tensor:
    """Row by row, forwards and backwards (Vim): (2, height * width)."""
    rows = raster(grid)
    return torch.cat([rows, reverse(rows)])


@register_route("cross")
def cross(grid: Tensor) -> Tensor:
    """The four directions of VMamba's SS2D: rows, columns, rows reversed, columns reversed: (4, height * width)."""
    forward = torch.cat([raster(grid), columns(grid)])
    return torch.cat([forward, reverse(forward)])

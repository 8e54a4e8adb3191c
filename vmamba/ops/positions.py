"""What treats every position of a map alike, called so that torch.compile leaves the map as it lies."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_position(function: Callable[..., Any], *maps: Tensor) -> Any:
    """``function(*maps)``, computed on (batch, positions, channels) in a compiled graph.

    In a graph with a convolution, inductor lays out anew whatever of four dimensions has several users or is kept for
    the backward pass: the second dimension last in memory, where it takes the channels to be. In a channels-last map
    that is the height, so the map would be transposed, and transposed back for its next reader. Tensors of three
    dimensions it lets alone, and views of them with one user. Eager mode has nothing to gain from more views.

    Args:
        function: Takes maps of either shape, and returns one, or a tuple of them.
        maps: (batch, height, width, channels), alike but for the channels and what is broadcast; what has other than
            four dimensions is passed as it is.
    """
    if not torch.compiler.is_compiling() or maps[0].dim() != 4:
        return function(*maps)
    size = maps[0].shape[1:3]
    result = function(*(x.flatten(1, 2) for x in maps))
    if isinstance(result, tuple):
        return tuple(y.unflatten(1, size) for y in result)
    return result.unflatten(1, size)


def channels_first(x: Tensor) -> Tensor:
    """A map (batch, height, width, channels) as a view (batch, channels, height, width); see :func:`by_position`."""
    if not torch.compiler.is_compiling():
        return x.permute(0, 3, 1, 2)
    return x.flatten(1, 2).transpose(1, 2).unflatten(2, x.shape[1:3])


def channels_last(x: Tensor) -> Tensor:
    """The view that undoes :func:`channels_first`."""
    if not torch.compiler.is_compiling():
        return x.permute(0, 2, 3, 1)
    return x.flatten(2).transpose(1, 2).unflatten(1, x.shape[2:])

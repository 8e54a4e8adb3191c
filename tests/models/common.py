"""The registered models, and small helpers the model tests share."""

import timm
import torch
from torch import nn

import vmamba  # noqa: F401  (registers the models)
from vmamba.models._plain import PlainBackbone


def registered(pattern: str = "*") -> list[str]:
    """The names of this package's models, aliases included."""
    return [name for name in timm.list_models(pattern) if timm.model_entrypoint(name).__module__.startswith("vmamba.")]


ALL = registered()
SMALL = registered("test_*")
PLAIN = [name for name in SMALL if isinstance(timm.create_model(name, device="meta"), PlainBackbone)]
HIERARCHICAL = [name for name in SMALL if name not in PLAIN]


def seeded(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A model in eval mode whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def image(*size: int, seed: int = 1) -> torch.Tensor:
    """A random input."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))

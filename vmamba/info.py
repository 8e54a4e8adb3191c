"""What is installed, what is built and what will run: ``python -m vmamba.info``, for users and for bug reports."""

import importlib.metadata
import platform
import sys

import torch

import vmamba
from vmamba.ops import backend_info
from vmamba.ops.extension import library_path

_OPTIONAL = (
    "timm",
    "torchvision",
    "fvcore",
    "mmengine",
    "mmcv",
    "mmdet",
    "mmsegmentation",
    "mamba-ssm",
    "causal-conv1d",
)


def report() -> str:
    """The whole report as text, one fact a line."""
    lines = [
        ("vmamba", vmamba.__version__),
        ("python", f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("extension", str(library_path() or "not built")),
    ]
    lines += [(name, version) for name in _OPTIONAL if (version := _version(name))]
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        lines.append(("gpu", f"{torch.cuda.get_device_name()} (compute capability {capability})"))
    lines += [(f"scan on {info.device}", f"{info.backend}: {info.reason}") for info in backend_info().values()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(report())

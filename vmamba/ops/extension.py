"""Finds and loads the compiled extension, and says what is built, what will run, and why."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute on: ``scalar_of`` in csrc/registration.cpp."""

_error: str | None = None
_kernels: frozenset[str] = frozenset()  # device types served; looked up once, since torch.compile traces the question


@dataclass(frozen=True)
class BackendInfo:
    """What serves the scan on one kind of device.

    Attributes:
        device: Device type, ``"cpu"`` or ``"cuda"``.
        backend: ``"kernel"``, ``"reference"`` or ``"none"``.
        reason: Why, and what to do about it where something is missing.
    """

    device: str
    backend: str
    reason: str


def library_path() -> Path | None:
    """The extension's file, or None where it was not built."""
    found = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    return found[0] if found else None


def load() -> None:
    """Loads the extension's kernels into the dispatcher; on failure warns and keeps the reason, it never raises."""
    global _error, _kernels
    path = library_path()
    if path is None:
        _error = "the extension is not built; run: pip install --no-build-isolation -e . (needs a C++17 compiler)"
    else:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            _error = f"{path.name} did not load under torch {torch.__version__}: {error.__cause__ or error}"
    found = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    _kernels = frozenset(device for device, key in keys.items() if found("vmamba::selective_scan_forward", key))
    if _error is not None and not os.environ.get("VMAMBA_NO_WARNING"):
        warnings.warn(f"vmamba runs on its slow PyTorch reference: {_error}", stacklevel=2)


def runs_on_reference() -> bool:
    """Whether the extension is missing, so that the reference serves CPU tensors (``load`` has warned of it)."""
    return _error is not None


def has_kernel(device_type: str) -> bool:
    """Whether the extension brought kernels for this device type."""
    return device_type in _kernels


def require_kernel(device: torch.device) -> None:
    """Raises RuntimeError, naming the cure, if calls on ``device`` would find no kernel."""
    if device.type in ("cpu", "meta") or has_kernel(device.type):
        return
    raise RuntimeError(
        f"vmamba has no kernel for device '{device.type}': {_missing(device.type)}; "
        "or pass backend='reference' to run the slow PyTorch reference"
    )


def backend_info() -> dict[str, BackendInfo]:
    """What runs on each kind of device, and why, by device type."""
    return {device: _device_info(device) for device in ("cpu", "cuda")}


def _device_info(device: str) -> BackendInfo:
    if device == "cpu" and _error is not None:
        return BackendInfo(device, "reference", _error)
    if has_kernel(device):
        if device == "cuda" and not torch.cuda.is_available():
            return BackendInfo(device, "none", "CUDA kernels are built, but torch sees no GPU")
        return BackendInfo(device, "kernel", _kernel_name(device))
    return BackendInfo(device, "none", _missing(device))


def _kernel_name(device: str) -> str:
    if device == "cpu":
        return f"C++ kernel, {torch.ops.vmamba.cpu_isa()}, {torch.get_num_threads()} threads"
    return f"CUDA kernel on {torch.cuda.get_device_name()}"


def _missing(device: str) -> str:
    if device != "cuda":
        return "there is none in this package"
    if _error is not None:
        return _error
    return (
        "this build is CPU only; reinstall from source where nvcc and a CUDA build of torch are present: "
        "pip install --no-build-isolation ."
    )

"""What figures depend on beside the settings of a job: hardware, versions, threads."""

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path

import timm
import torch

import vmamba
from vmamba.analysis.benchmark.results import Environment
from vmamba.ops import backend_info


def describe(device: torch.device) -> Environment:
    """Facts that must agree where figures are compared, and the date and version of the code, which may not."""
    facts: Environment = {"device": device.type, **(_gpu(device) if device.type == "cuda" else _cpu())}
    facts |= {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "vmamba": vmamba.__version__,
        "commit": _commit(),
        "kernel": backend_info()[device.type].reason,
        "date": datetime.date.today().isoformat(),
    }
    return facts


CODE_FACTS = ("vmamba", "commit", "kernel", "date")
"""What may differ between two results that are compared: what one compares them for."""


def _gpu(device: torch.device) -> Environment:
    properties = torch.cuda.get_device_properties(device)
    return {
        "hardware": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _nvidia_smi("driver_version"),
        "power_limit": _nvidia_smi("power.limit"),
        "threads": torch.get_num_threads(),
    }


def _nvidia_smi(fact: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={fact}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else ""


def _cpu() -> Environment:
    return {
        "hardware": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that the package lies in, with a + where it was changed; empty elsewhere."""
    root = Path(vmamba.__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

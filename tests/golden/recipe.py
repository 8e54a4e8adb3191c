"""How the golden files in this folder were made, and how to use them.

A golden file pins one published model variant: the parameter layout of its published checkpoints, and the
numbers its published implementation computes in float32 from weights and an input that anyone can rebuild from
names alone. No weights are stored: `weight(key, shape, dtype)` makes each tensor from the CRC-32 of its key.

    {
      "variant":    "vmamba_tiny_s1l8",
      "published":  "where the variant is defined: repository, file, factory or config",
      "params":     30249000,                     # as counted over the published module's parameters
      "state_dict": [["patch_embed.0.weight", [48, 3, 3, 3], "float32"], ...],   # published key, shape, dtype
      "input":      {"height": 224, "width": 224, "batch": 2},                   # image(height, width, batch)
      "outputs":    {"logits": summary, "stage0": summary, ...}                  # absent: layout only
    }

A summary holds a tensor's shape, mean, standard deviation and values at evenly spaced flat indices (all of them
for a tensor of up to 4,096 numbers). `mismatch(tensor, summary)` gives the largest error over the recorded values,
relative to the tensor's standard deviation. Independent float32 implementations agree to 4e-5 or better, so test
at 1e-4: at 1e-3 a tanh GELU in place of the exact one would pass. (The epsilon of a norm is not visible: read it.)
"""

import re
import zlib

import numpy as np


def _normal(name: str, shape) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def weight(key: str, shape, dtype: str = "float32") -> np.ndarray:
    """The value of the parameter or buffer published under `key`."""
    shape = tuple(shape)
    if not dtype.startswith(("float", "bfloat")):
        return np.zeros(shape, dtype)
    z = _normal(key, shape)
    if key.endswith("running_mean"):
        v = 0.1 * z
    elif key.endswith("running_var"):
        v = 1 + 0.1 * np.abs(z)
    elif re.search(r"(^|\.)A\w*_logs?$", key):  # A_log, A_b_log, A_logs
        v = 0.5 * z
    elif re.search(r"(^|\.)(Ds|D|D_b)$", key):
        v = 1 + 0.1 * z
    elif re.search(r"dt_?\w*[._]bias$", key):  # dt_projs_bias, dt_proj.bias, dt_bias
        v = -3 + 0.5 * z
    elif len(shape) >= 2:
        fan_in = shape[-1] if len(shape) == 3 and "conv" not in key else int(np.prod(shape[1:]))
        v = z / np.sqrt(max(fan_in, 1))
        if re.search(r"(^|\.)cpe\d?\.weight$", key):  # residual depthwise convs: keep the stream from growing
            v = 0.2 * v
    elif key.endswith("bias"):
        v = 0.1 * z
    else:  # norm weights, layer scales, scalars
        v = 1 + 0.1 * z
    return np.asarray(v, dtype="float32")


def image(height: int, width: int, batch: int = 2) -> np.ndarray:
    """The input: (batch, 3, height, width) float32."""
    return _normal(f"input:{height}x{width}", (batch, 3, height, width)).astype("float32")


def _indices(n: int, most: int = 4096) -> np.ndarray:
    return np.arange(n) if n <= most else np.linspace(0, n - 1, 512).astype(np.int64)


def summary(array) -> dict:
    a = np.asarray(array, dtype=np.float64)
    flat = a.reshape(-1)
    return {
        "shape": list(a.shape),
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "values": [float(f"{v:.7g}") for v in flat[_indices(flat.size)]],
    }


def mismatch(array, want: dict) -> float:
    a = np.asarray(array, dtype=np.float64)
    if list(a.shape) != want["shape"]:
        raise ValueError(f"shape {list(a.shape)}, expected {want['shape']}")
    flat = a.reshape(-1)
    got = flat[_indices(flat.size)]
    if not np.isfinite(flat).all():
        return float("inf")
    return float(np.abs(got - np.asarray(want["values"])).max() / max(want["std"], 1e-12))

"""Loads a built extension under the torch of this interpreter and compares it with the reference.

    python tools/check_abi.py [path/to/_C.so]

Needs torch and nothing else, so it runs under torch versions that other packages do not support yet: this is how one
shows that a binary built against one torch serves another without a rebuild.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).resolve().parent.parent / "vmamba"


def load_alone(name: str) -> ModuleType:
    """A module of vmamba.ops by path, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "ops" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(library: Path) -> None:
    schema, reference = load_alone("schema"), load_alone("reference").selective_scan_reference
    definitions = torch.library.Library("vmamba", "DEF")
    for op in schema.FORWARD_OPS:
        definitions.define(op + schema.FORWARD)
    definitions.define("selective_scan_backward" + schema.BACKWARD)
    definitions.define("cpu_isa" + schema.CPU_ISA)
    torch.ops.load_library(str(library))

    torch.manual_seed(0)
    batch, L, D, K, N, R = 2, 70, 33, 4, 2, 3
    inputs = [
        torch.randn(batch, L, D), torch.randn(batch, L, K, R), -torch.rand(K, D, N), torch.randn(batch, L, K, N),
        torch.randn(batch, L, K, N), torch.randn(K, D), torch.randn(K, D, R), torch.randn(K, D),
    ]  # fmt: skip
    route = torch.randint(0, L, (K, L), dtype=torch.int32)
    tail = (route, None, None, True, "merged")
    out, checkpoints = torch.ops.vmamba.selective_scan_forward(*inputs, *tail, torch.float32, 64)
    grad = torch.randn_like(out)
    found = torch.ops.vmamba.selective_scan_backward(grad, checkpoints, *inputs, *tail, 64)

    *positional, dt_weight, dt_bias = leaves = [x.double().requires_grad_() for x in inputs]
    want = reference(*positional, dt_weight=dt_weight, dt_bias=dt_bias, route=route, out_dtype=torch.float64)
    wanted = torch.autograd.grad(want, leaves, grad.double())
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip((out, *found), (want, *wanted), strict=True)]
    assert max(errors) < 5e-6, errors
    print(f"{library.name} agrees under torch {torch.__version__}: {torch.ops.vmamba.cpu_isa()}, {max(errors):.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else next(PACKAGE.glob("_C*.so")))

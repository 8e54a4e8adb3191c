"""The CUDA LayerNorm against PyTorch's in float64, result and gradients."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error
from vmamba.ops import layer_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
TYPES = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("channels", [4, 48, 96, 132, 192, 384, 768, 1024, 1536])
@pytest.mark.parametrize(("dtype", "out_dtype"), TYPES, ids=str)
def test_result_and_gradients(channels, dtype, out_dtype):
    torch.manual_seed(channels)
    x = (2 * torch.randn(3, 7, 11, channels, device="cuda") + 1).to(dtype).requires_grad_()
    weight = torch.randn(channels, device="cuda", requires_grad=True)
    bias = torch.randn(channels, device="cuda", requires_grad=True)
    got = layer_norm(x, weight, bias, 1e-5, out_dtype)
    assert "EagerNorm" in got.grad_fn.name()
    grad = torch.randn_like(got)
    found = torch.autograd.grad(got, (x, weight, bias), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = F.layer_norm(exact[0], (channels,), exact[1], exact[2], 1e-5)
    wanted = torch.autograd.grad(want, exact, grad.double())
    assert got.dtype == out_dtype
    assert relative_error(got, want) < TOLERANCE[out_dtype]
    for name, gradient, right in zip(("x", "weight", "bias"), found, wanted, strict=True):
        assert relative_error(gradient, right) < TOLERANCE[dtype if name == "x" else torch.float32], name
    with torch.no_grad():
        assert torch.equal(layer_norm(x, weight, bias, 1e-5, out_dtype), got)
    again = torch.autograd.grad(layer_norm(x, weight, bias, 1e-5, out_dtype), (x, weight, bias), grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("channels", [3, 97, 2048])
def test_widths_without_a_kernel_go_through_torch(channels):
    x = torch.randn(5, channels, device="cuda")
    got = layer_norm(x, torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda"))
    assert relative_error(got, F.layer_norm(x.double(), (channels,))) < 2e-6

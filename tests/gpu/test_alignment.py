"""Projections of a number of features that is no multiple of eight, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from vmamba.layers import SelectiveSSM
from vmamba.ops.alignment import aligned_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [6, 8, 34])
def test_a_product_is_the_same(rows, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 300, 96, device="cuda"), torch.randn(rows, 96, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found, wanted = aligned_linear(x, weight), F.linear(x, weight)
    assert found.dtype == dtype and found.shape == wanted.shape
    assert dtype == torch.float32 or found.stride(1) % 8 == 0
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(wanted)
    grads = [torch.autograd.grad(y, weight, grad)[0] for y in (found, wanted)]
    assert (grads[0] - grads[1]).norm() < 1e-2 * grads[1].norm()


@pytest.mark.parametrize("directions", [1, 4])
@torch.no_grad()
def test_a_scan_reads_what_lies_further_apart(directions):
    torch.manual_seed(0)
    ssm = SelectiveSSM(96, 5, 1, directions, device="cuda")
    u, route = torch.randn(3, 200, 96, device="cuda"), torch.arange(200, dtype=torch.int32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = ssm(u.bfloat16(), route.repeat(directions, 1))
        ssm.x_proj.register_forward_hook(lambda *_: None)  # from here on it is called, and not aligned
        wanted = ssm(u.bfloat16(), route.repeat(directions, 1))
    assert (found - wanted).norm() < 1e-2 * wanted.norm()

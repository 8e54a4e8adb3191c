"""LayerNorm in any dtype against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error
from vmamba.layers import BranchNorm, LayerNorm, ScanNorm
from vmamba.ops import layer_norm

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_float64(dtype, out_dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 7, 20) + 1).to(dtype)
    weight, bias = torch.randn(20), torch.randn(20)
    got = layer_norm(x, weight, bias, 1e-5, out_dtype)
    assert got.dtype == (out_dtype or dtype)
    want = F.layer_norm(x.double(), (20,), weight.double(), bias.double(), 1e-5)
    assert relative_error(got, want) < TOLERANCE[torch.float32 if out_dtype and dtype != torch.float64 else got.dtype]


@pytest.mark.parametrize("norm", [LayerNorm, BranchNorm])
def test_the_modules_are_torchs_layer_norm(norm):
    torch.manual_seed(0)
    ours, theirs = norm(24, eps=1e-3), torch.nn.LayerNorm(24, eps=1e-3)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 24)
    assert torch.equal(ours(x), theirs(x))


def test_dtypes_under_autocast():
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(8)(x).dtype == torch.float32
        assert BranchNorm(8)(x.float()).dtype == torch.bfloat16
    assert LayerNorm(8)(x.float()).dtype == BranchNorm(8)(x.float()).dtype == torch.float32
    assert ScanNorm(8)(x.float(), torch.bfloat16).dtype == torch.bfloat16


def test_float16_results_survive_a_sum_beyond_its_range():
    y = torch.full((1, 2, 8), 1e5)
    y[..., 0] = -1e5
    assert ScanNorm(8)(y, torch.float16).isfinite().all()

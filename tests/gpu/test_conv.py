"""Convolutions of images on a GPU: by patches in 16 bits, as PyTorch's convolution elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba.layers import ConvNormAct
from vmamba.layers.conv import Conv2d, Conv2dNHWC

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Convolutions(TorchDispatchMode):
    """Counts calls of PyTorch's convolution."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (4, 4, 0), (16, 16, 0), (16, 8, 0), (7, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [Conv2d, Conv2dNHWC])
def test_images_are_convolved_by_patches(layer, kernel, stride, padding, dtype):
    torch.manual_seed(0)
    conv = layer(3, 48, kernel, stride, padding).cuda()
    image = torch.randn(2, 3, 66, 80, device="cuda")
    x = image.permute(0, 2, 3, 1).contiguous() if layer is Conv2dNHWC else image
    with torch.autocast("cuda", dtype), Convolutions() as convolutions:
        y = conv(x)
    assert convolutions.count == 0
    assert y.dtype == dtype
    y = y.permute(0, 3, 1, 2) if layer is Conv2dNHWC else y
    weight, bias = (p.detach().double().requires_grad_() for p in (conv.weight, conv.bias))
    expected = F.conv2d(image.to(dtype).double(), weight, bias, stride, padding)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 3e-3, "atol": 3e-3}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (conv.weight, conv.bias), grad)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (weight, bias), grad.double()), strict=True):
        assert (ours.double() - theirs).norm() < (8e-3 if dtype == torch.bfloat16 else 1e-3) * theirs.norm()


@pytest.mark.parametrize(
    ("conv", "image", "dtype"),
    [
        (Conv2d(3, 8, 3), torch.randn(1, 3, 16, 16), torch.float32),
        (Conv2d(8, 8, 3), torch.randn(1, 8, 16, 16), torch.bfloat16),
        (Conv2d(4, 8, 3, groups=2), torch.randn(1, 4, 16, 16), torch.bfloat16),
        (Conv2d(3, 8, 3, dilation=2), torch.randn(1, 3, 16, 16), torch.bfloat16),
        (Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), torch.randn(1, 3, 16, 16), torch.bfloat16),
        (Conv2d(3, 8, 3, padding="same"), torch.randn(1, 3, 16, 16), torch.bfloat16),
        (Conv2d(3, 8, 3), torch.randn(1, 3, 16, 16, requires_grad=True), torch.bfloat16),
    ],
)
def test_all_else_is_pytorchs_convolution(conv, image, dtype):
    conv, image = conv.to("cuda", dtype), image.to("cuda", dtype)
    with Convolutions() as convolutions:
        y = conv(image)
    assert convolutions.count == 1
    torch.testing.assert_close(y, torch.nn.Conv2d.forward(conv, image))


def test_a_stem_of_channels_first_convolutions():
    layer = ConvNormAct(3, 16, 3, stride=2).cuda().eval()
    image = torch.randn(2, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    expected = layer(image)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(image)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)

import pytest
import timm
import torch
from torch import nn

import vmamba.models  # noqa: F401
from vmamba.analysis.erf import ReceptiveField, Square, draw_receptive_fields, effective_receptive_field
from vmamba.errors import UserError


class Convolutions(nn.Module):
    """A linear network whose receptive field can be told from its kernels."""

    def __init__(self, *kernels):
        super().__init__()
        self.kernels = kernels

    def forward_intermediates(self, x, indices=None, norm=False, intermediates_only=True):
        for kernel in self.kernels:
            x = nn.functional.conv2d(x, kernel.view(1, 1, 3, 3), padding=1)
        return [x]


def positive_images(*size):
    return torch.rand(*size) + 0.1


def test_of_one_convolution_it_is_the_kernel():
    kernel = torch.arange(1.0, 10.0).view(3, 3)
    field = effective_receptive_field(Convolutions(kernel), [positive_images(4, 1, 9, 11)])
    expected = torch.zeros(9, 11, dtype=torch.float64)
    expected[3:6, 4:7] = kernel / 45  # around the middle, (4, 5)
    torch.testing.assert_close(field.heat, expected, rtol=1e-6, atol=0)
    assert field.images == 4


def test_the_smallest_square_that_holds_a_share():
    ones = torch.ones(3, 3)
    field = effective_receptive_field(Convolutions(ones, ones), [positive_images(1, 1, 11, 11)])
    # Of 81: 9 in the middle, 25 in the best 2x2, 49 in 3x3, 64 in 4x4, all in 5x5.
    sides = {share: field.square(share / 81).side for share in (8, 9, 10, 49, 50, 64, 65, 81)}
    assert sides == {8: 1, 9: 1, 10: 2, 49: 3, 50: 4, 64: 4, 65: 5, 81: 5}
    whole = field.square(1.0)
    assert (whole.top, whole.left) == (3, 3)
    assert whole.area == pytest.approx(25 / 121)
    with pytest.raises(ValueError, match="share"):
        field.square(0)


def test_a_square_lies_where_the_field_is_and_ends_with_the_image():
    heat = torch.zeros(4, 10, dtype=torch.float64)
    heat[1, 2] = heat[2, 3] = 0.2
    heat[0, 9] = 0.6
    field = ReceptiveField(heat, 1)
    assert field.square(0.5) == Square(1, 0, 9, 1 / 40)
    assert field.square(0.9) == Square(8, 0, 2, 32 / 40)
    assert ReceptiveField(torch.ones(4, 10).double() / 40, 1).square(0.99).side == 10


def test_it_is_averaged_over_images():
    model = timm.create_model("test_convnext", num_classes=0)
    images = torch.randn(3, 3, 64, 96)
    together = effective_receptive_field(model, [images])
    one_by_one = effective_receptive_field(model, images.split(1))
    torch.testing.assert_close(together.heat, one_by_one.heat, rtol=1e-4, atol=1e-9)
    assert one_by_one.images == 3
    assert float(together.heat.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim", "test_msvmambav3", "test_spatialmamba"])
def test_a_scan_sees_the_whole_image(name):
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    field = effective_receptive_field(model, [torch.randn(1, 3, 64, 48)])
    assert field.heat.shape == (64, 48)
    assert float((field.heat > 0).double().mean()) > 0.99
    assert model.training


def test_what_cannot_be_measured():
    model = timm.create_model("test_vmamba")
    with pytest.raises(ValueError, match="there are none"):
        effective_receptive_field(model, [])
    with pytest.raises(UserError, match="forward_intermediates"):
        effective_receptive_field(nn.Conv2d(3, 3, 3), [torch.randn(1, 3, 8, 8)])
    with torch.no_grad():
        model.stem.conv1.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="zero or not finite"):
        effective_receptive_field(model, [torch.randn(1, 3, 32, 32)])


def test_a_drawing_has_a_panel_for_each_field():
    field = effective_receptive_field(Convolutions(torch.ones(3, 3)), [positive_images(1, 1, 8, 12)])
    figure = draw_receptive_fields([("before", field), ("after", field)])
    titles = [axes.get_title() for axes in figure.get_axes()]
    assert [title.split("\n")[0] for title in titles] == ["before", "after"]

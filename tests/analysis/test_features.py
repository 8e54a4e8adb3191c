import pytest
import timm
import torch
from torch import nn

import vmamba.models  # noqa: F401
from vmamba.analysis.features import channel_norm, draw_features, feature_maps, pca_colours
from vmamba.errors import UserError


def test_components_come_in_the_order_of_their_strength():
    torch.manual_seed(0)
    patterns = torch.linalg.qr(torch.randn(2 * 5 * 7, 3))[0].t().view(3, 2, 5, 7)
    patterns = patterns - patterns.mean((1, 2, 3), keepdim=True)
    directions = torch.linalg.qr(torch.randn(8, 8))[0][:3]
    scale = torch.tensor([1.0, 100.0, 10.0])
    values = torch.einsum("pbhw,pc,p->bchw", patterns, directions, scale) + 3.0
    colours = pca_colours(values)
    assert colours.shape == (2, 3, 5, 7)
    assert colours.min() >= 0 and colours.max() <= 1
    for colour, pattern in zip((0, 1, 2), (1, 2, 0), strict=True):
        pair = torch.stack([colours[:, colour].flatten(), patterns[pattern].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.97  # stretching cuts 2 % off


@pytest.mark.parametrize("channels", [1, 2])
def test_components_that_do_not_exist_are_grey(channels):
    colours = pca_colours(torch.randn(1, channels, 6, 6))
    assert (colours[:, channels:] == 0.5).all()
    assert colours[:, :channels].std() > 0


def test_a_constant_map_is_grey():
    assert (pca_colours(torch.ones(1, 4, 3, 3)) == 0.5).all()


def test_norm_over_channels():
    values = torch.zeros(1, 2, 1, 2)
    values[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    assert channel_norm(values).tolist() == [[[5.0, 0.0]]]


def test_the_maps_of_all_stages_and_of_some_blocks():
    model = timm.create_model("test_vmamba").train()
    maps = feature_maps(model, torch.randn(2, 3, 64, 96))
    assert [part.name for part in maps] == [f"stages.{i}" for i in range(4)]
    assert [tuple(part.values.shape[-2:]) for part in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert model.training
    deep = feature_maps(timm.create_model("vim_tiny_patch16_224", embed_dim=16), torch.randn(1, 3, 32, 32))
    assert [part.name for part in deep] == [f"blocks.{i}" for i in (5, 11, 17, 23)]
    chosen = feature_maps(model, torch.randn(1, 3, 32, 32), [2, 0])
    assert [part.name for part in chosen] == ["stages.0", "stages.2"]


def test_what_has_no_such_map():
    with pytest.raises(UserError, match=r"no map 4; there are 0 to 3"):
        feature_maps(timm.create_model("test_vmamba"), torch.randn(1, 3, 32, 32), [4])
    with pytest.raises(UserError, match="forward_intermediates"):
        feature_maps(nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8))


def test_a_drawing_has_a_row_for_each_image_and_view():
    images = torch.rand(2, 3, 32, 32)
    maps = feature_maps(timm.create_model("test_vmamba"), images)
    figure = draw_features(images, maps, ("pca", "norm"))
    drawn = [axes for axes in figure.get_axes() if axes.images]
    assert len(drawn) == 2 * 2 * (1 + 4)
    with pytest.raises(ValueError, match="views"):
        draw_features(images, maps, ("tsne",))

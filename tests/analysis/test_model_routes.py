import pytest
import timm
import torch

import vmamba.models  # noqa: F401
from vmamba.analysis.model_routes import draw_model_routes, model_routes
from vmamba.analysis.scans import model_scans
from vmamba.errors import UserError
from vmamba.ops import get_route


def routes_of(name, height, width):
    return model_routes(timm.create_model(name), torch.zeros(1, 3, height, width))


def test_the_routes_of_each_stage_on_its_grid():
    walks = routes_of("test_vmamba", 64, 96)
    assert [(walk.height, walk.width) for walk in walks] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for walk in walks:
        assert torch.equal(walk.route, get_route("cross", walk.height, walk.width))


def test_a_class_token_is_left_out():
    (walk,) = routes_of("test_vim", 20, 28)
    assert torch.equal(walk.route, get_route("bidirectional", walk.height, walk.width))


def test_a_second_table_is_drawn_as_well():
    by_input, by_parameters = routes_of("test_plainmamba", 20, 28)
    assert torch.equal(by_input.route, get_route("snake", by_input.height, by_input.width))
    assert torch.equal(by_parameters.route, get_route("raster", by_input.height, by_input.width))


def test_passes_of_one_sequence_are_drawn_one_by_one():
    full, low = routes_of("test_msvmamba", 36, 44)[:2]
    assert (full.height, full.width, low.height, low.width) == (9, 11, 5, 6)
    assert torch.equal(low.route.flatten(), get_route("three_passes", 5, 6)[0])
    assert low.route.shape == (3, 30)


def test_the_model_is_left_as_it_was():
    model = timm.create_model("test_vmamba").train()
    before = [len(module._forward_hooks) for module in model.modules()]
    model_scans(model, torch.zeros(2, 3, 32, 32))
    assert model.training
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_the_scans_carry_the_names_of_their_blocks():
    scans = model_scans(timm.create_model("test_msvmamba"), torch.zeros(1, 3, 32, 32))
    assert [scan.block for scan in scans] == [f"stages.{i}.blocks.0" for i in range(4) for _ in range(2)]


def test_a_model_that_does_not_scan():
    with pytest.raises(UserError, match="does not scan"):
        model_scans(timm.create_model("test_convnext"), torch.zeros(1, 3, 32, 32))


def test_a_drawing_has_a_panel_for_each_direction():
    figure = draw_model_routes(routes_of("test_msvmamba", 36, 44)[:2])
    drawn = [axes for axes in figure.get_axes() if axes.collections]
    assert len(drawn) == 1 + 3

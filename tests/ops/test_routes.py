"""Routes: their definitions, the registry, the cache and the picture."""

import pytest
import torch

from vmamba.ops import check_route, draw_route, get_route, grid_table, list_routes, register_route, reverse, routes

SIZES = [(1, 1), (1, 7), (6, 1), (3, 4), (7, 5), (14, 14)]


def rows_first(height, width):
    return [row * width + column for row in range(height) for column in range(width)]


def columns_first(height, width):
    return [row * width + column for column in range(width) for row in range(height)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_definitions(height, width):
    rows, columns = rows_first(height, width), columns_first(height, width)
    assert get_route("raster", height, width).tolist() == [rows]
    assert get_route("columns", height, width).tolist() == [columns]
    assert get_route("bidirectional", height, width).tolist() == [rows, rows[::-1]]
    assert get_route("cross", height, width).tolist() == [rows, columns, rows[::-1], columns[::-1]]


@pytest.mark.parametrize("name", list_routes())
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_registered_route_is_valid(name, height, width):
    route = get_route(name, height, width)
    assert route.dtype == torch.int32 and route.is_contiguous() and route.dim() == 2
    check_route(route, height * width)


def test_reverse():
    assert reverse(torch.tensor([[0, 1, 2]], dtype=torch.int32)).tolist() == [[2, 1, 0]]


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(routes, "_BUILDERS", dict(routes._BUILDERS))


def test_users_can_register_a_route(registry):
    @register_route("main_diagonal")
    def main_diagonal(grid):
        return grid.diagonal().unsqueeze(0)

    route = get_route("main_diagonal", 3, 4)
    assert route.tolist() == [[0, 5, 10]] and route.dtype == torch.int32
    with pytest.raises(ValueError, match="'main_diagonal' is registered already"):
        register_route("main_diagonal")(main_diagonal)


def test_a_wrong_route_is_refused_when_it_is_made(registry):
    register_route("off_the_map")(lambda grid: torch.tensor([[grid.numel()]]))
    with pytest.raises(ValueError, match=r"entries must lie in \[-1, 12\), got 12..12"):
        get_route("off_the_map", 3, 4)
    register_route("fractional")(lambda grid: torch.zeros(1, 3))
    with pytest.raises(ValueError, match="integer table"):
        get_route("fractional", 3, 4)


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match="no route is registered as 'cros'; did you mean cross"):
        get_route("cros", 3, 4)


def test_routes_are_cached_and_usable_in_training_wherever_they_were_made():
    with torch.inference_mode():
        first = get_route("cross", 11, 13)
    assert get_route("cross", 11, 13) is first
    assert not first.is_inference()


def test_grid_tables_are_cached_and_need_not_be_routes():
    @grid_table
    def rows_from_a_hundred(grid):
        return grid // grid.shape[1] + 100

    table = rows_from_a_hundred(2, 3)

    assert table.tolist() == [[100, 100, 100], [101, 101, 101]]
    assert table.dtype == torch.int32
    assert rows_from_a_hundred(2, 3) is table
    assert rows_from_a_hundred(2, 3, "meta").device.type == "meta"


def test_the_picture(tmp_path):
    route = torch.cat([get_route("cross", 4, 6), torch.full((4, 2), -1, dtype=torch.int32)], dim=1)
    figure = draw_route(route, 4, 6, title="cross")
    assert [len(panel.collections[0].get_segments()) for panel in figure.axes] == [23] * 4
    figure.savefig(tmp_path / "route.svg")
    assert (tmp_path / "route.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match="entries must lie in"):
        draw_route(route, 3, 6)

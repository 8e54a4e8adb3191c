"""Draws every registered route into docs/routes: a family's under the family's name, others under their own.

python tools/draw_routes.py
"""

from pathlib import Path

import matplotlib

import vmamba.models  # noqa: F401  (families register their routes)
from vmamba.ops import draw_route, get_route, list_routes

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "routes"
HEIGHT, WIDTH = 6, 8

FAMILIES = {
    "bidirectional": "vim",
    "cross": "vmamba",
    "atrous": "efficientvmamba",
    "snake": "plainmamba",
    "raster": "spatialmamba",
    "three_passes": "msvmamba",
}
"""The family that a route is known by."""


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "vmamba"  # the same drawing makes the same file
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in list_routes():
        route = get_route(name, HEIGHT, WIDTH)
        passes = route.shape[1] // (HEIGHT * WIDTH)
        if passes > 1:  # one sequence over the map several times: each time in its own panel
            route = route.unflatten(1, (passes, -1)).flatten(0, 1)
        figure = draw_route(route, HEIGHT, WIDTH, title=name)
        path = FOLDER / f"{FAMILIES.get(name, name)}.svg"
        figure.savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()

"""The Python on the pages of the documentation runs, page by page, as a reader would type it."""

import copy
import re
import sys
from pathlib import Path

import pytest
import timm.models._registry as timm_registry

from vmamba.ops import routes

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("usage.md", "operator.md", "pictures.md", "extending.md")
_BLOCK = re.compile(r'^```python(?: title="(?P<file>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture
def registries(monkeypatch):
    """What a page registers with timm and with the routes is gone afterwards."""
    tables = [name for name in vars(timm_registry) if name.startswith(("_model_", "_module_"))]
    for module, names in ((routes, ["_BUILDERS"]), (timm_registry, tables)):
        for name in names:
            monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)
    namespace = {"__name__": page}
    blocks = list(_BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")))
    assert blocks
    try:
        for block in blocks:
            if block["file"]:
                (tmp_path / block["file"]).write_text(block["code"], encoding="utf-8")
            else:
                exec(compile(block["code"], page, "exec"), namespace)
    finally:
        for name in set(sys.modules) - modules:
            if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == tmp_path:
                del sys.modules[name]

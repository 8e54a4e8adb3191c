"""What the documentation is made of by itself, and that nothing broken passes."""

import re
from pathlib import Path

import docs_pages
import mkdocs.config
import model_zoo
import pytest
from mkdocs.commands.build import build
from mkdocs.exceptions import Abort, PluginError

from vmamba.weights import checkpoints

ROOT = Path(__file__).parents[2]


def rows(page, heading):
    """The cells of a table under a heading, a dictionary for each row."""
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (table,) = [part for part in section if part.startswith(heading)]
    head, _, *lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in [head, *lines]]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    (results / "speed.csv").write_text(
        "model,task,mode,dtype,batch,size,images_per_s,hardware\n"
        "vmamba_tiny,inference,eager,float32,8,224,12.5,a CPU\n"
        "vmamba_tiny_s1l8,inference,compiled,bfloat16,128,224,12345.6,a GPU\n"
        "swin_tiny_patch4_window7_224,training,eager,float32,8,224,3.0,a CPU\n"
        "vmamba_tiny,inference,eager,float32,999,224,,a CPU\n"
    )
    (results / "other.csv").write_text("what,ms\nscan,1.0\n")
    names = ("vmamba_tiny_s1l8.in1k", "vmamba_tiny_s1l8_mask_rcnn_1x.coco", "msvmamba_tiny_upernet_160k.ade20k")
    return model_zoo.model_zoo([checkpoints()[name] for name in names], results)


def test_a_classifier_in_the_zoo(zoo):
    (row,) = rows(zoo, "ImageNet-1K")
    checkpoint = checkpoints()["vmamba_tiny_s1l8.in1k"]
    assert row["name"] == f"`{checkpoint.name}`"
    assert row["top-1"] == str(checkpoint.metrics["top1"])
    assert float(row["params (M)"]) == pytest.approx(checkpoint.params_m, abs=0.005)
    assert row["images/s here"] == "[12,346](#speed-measured-here)"
    assert row["licence"] == checkpoint.license
    assert checkpoint.page in row["weights"] and checkpoint.paper in row["paper"]


def test_a_detector_and_a_segmentor_in_the_zoo(zoo):
    (detector,), (segmentor,) = rows(zoo, "COCO"), rows(zoo, "ADE20K")
    published = checkpoints()["vmamba_tiny_s1l8_mask_rcnn_1x.coco"]
    assert (detector["box AP"], detector["mask AP"]) == tuple(
        str(published.metrics[key]) for key in ("box_ap", "mask_ap")
    )
    assert detector["configuration"] == f"`{published.config}`"
    assert (ROOT / "configs" / "detection" / f"{published.config}.py").exists()
    assert segmentor["mIoU, multi-scale"] == "-"  # not published
    assert segmentor["notes"] == checkpoints()["msvmamba_tiny_upernet_160k.ade20k"].note


def test_measured_speeds_in_the_zoo(zoo):
    table = rows(zoo, "Speed measured here")
    assert [(row["model"], row["inference"], row["training"], row["hardware"]) for row in table] == [
        ("`vmamba_tiny_s1l8`", "12", "-", "a CPU"),
        ("`vmamba_tiny_s1l8`", "12,346", "-", "a GPU"),
        ("`swin_tiny_patch4_window7_224`", "-", "3", "a CPU"),
    ]


def test_the_results_there_are_can_be_read():
    speeds = model_zoo.read_speeds(ROOT / "results")
    assert speeds
    assert all(speed.images_per_s > 0 and all(speed.settings) for speed in speeds)


def test_a_readme_as_a_page():
    text = (
        "[a](../docs/environment.md#x) [b](../results/README.md) [`cpu.py`](cpu.py) [c](https://x.y/z) [d](#here) "
        "![e](../docs/images/digits.png)"
    )
    assert docs_pages.turn_links(text, ROOT / "benchmarks" / "README.md") == (
        "[a](environment.md#x) [b](results.md) `cpu.py` (`benchmarks/cpu.py`) [c](https://x.y/z) [d](#here) "
        "![e](images/digits.png)"
    )


def test_links_of_a_page():
    page = ROOT / "docs" / "training.md"
    own = "[a](usage.md#x) ![b](images/digits.png)"
    assert docs_pages.turn_links(own, page) == own
    assert docs_pages.turn_links("[models](../checkpoints/README.md)", page) == "[models](model_zoo.md)"
    assert docs_pages.turn_links("[recipes](../configs/classification)", page) == "recipes (`configs/classification`)"
    with pytest.raises(PluginError, match=r"docs/training.md links to ../confs, which does not exist"):
        docs_pages.turn_links("[recipes](../confs)", page)
    with pytest.raises(PluginError, match=r"links to results.md, which does not exist"):
        docs_pages.turn_links("[made, not there to be read](results.md)", page)


def test_roles_of_docstrings_become_links():
    html = (
        '<h3 id="vmamba.a.A.go">go</h3> <p>:meth:<code>go</code> :func:<code>vmamba.b.run</code></p>'
        '<h3 id="vmamba.b.B.go">go</h3> <p>:class:<code>~torch.Tensor</code></p> <h3 id="vmamba.b.c.run">run</h3>'
    )
    linked = docs_pages.on_page_content(html)
    assert '<p><a href="#vmamba.a.A.go"><code>go</code></a> ' in linked
    assert ' <a href="#vmamba.b.c.run"><code>vmamba.b.run</code></a></p>' in linked
    assert "<p><code>torch.Tensor</code></p>" in linked


@pytest.mark.parametrize("name", docs_pages.LINKING)
def test_links_of_files_that_are_no_pages(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    docs_pages.check_links(text, ROOT / name)
    with pytest.raises(PluginError, match="which does not exist"):
        docs_pages.check_links(text + "[x](no/such/file.md)", ROOT / name)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("[a](other.md#there)", True),
        ("[a](other.md#gone)", False),
        ("[a](gone.md)", False),
        ("![a](gone.png)", False),
        ("[a](#gone)", False),
        ("[a](/index.md)", False),
    ],
)
def test_broken_links_fail_the_build(text, passes, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# A page\n\n{text}\n")
    (docs / "other.md").write_text("# Another\n\n## There\n")
    config = mkdocs.config.load_config(
        str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(tmp_path / "site"), hooks=[], plugins=[],
        nav=["index.md", "other.md"], theme="mkdocs", markdown_extensions=[],
    )  # fmt: skip
    if passes:
        build(config)
        assert (tmp_path / "site" / "other" / "index.html").exists()
    else:
        with pytest.raises(Abort):
            build(config)

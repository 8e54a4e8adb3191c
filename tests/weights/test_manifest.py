"""The manifest's facts, against the models, the configurations and each other."""

import re
from collections import Counter
from pathlib import Path

import pytest
import timm
from timm.models import get_pretrained_cfg

from tests.models.common import registered
from tests.models.golden import golden
from vmamba.errors import UserError
from vmamba.weights import aliases, checkpoints, find, table

ROOT = Path(__file__).resolve().parents[2]
ALL = list(checkpoints().values())
METRICS = {
    "classification": {"top1", "top5"},
    "detection": {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"},
    "segmentation": {"miou_ss", "miou_ms"},
}
MAIN_METRIC = {"classification": "top1", "detection": "box_ap", "segmentation": "miou_ss"}


def test_every_backbone_is_a_registered_model():
    assert {item.backbone for item in ALL} <= set(registered())


def test_every_classifier_is_what_timm_knows():
    for item in ALL:
        if item.task == "classification":
            cfg = get_pretrained_cfg(item.name)
            assert (cfg.url, cfg.license, cfg.paper_name) == (item.url, item.license, item.title)
            assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (item.hub, item.file)
            assert cfg.paper_ids == f"arXiv:{item.paper}"


def test_every_published_model_is_in_it():
    """A model without weights is a small one of this package."""
    without = {name for name in registered() if not get_pretrained_cfg(name).has_weights}
    assert all(re.match(r"test_|.*_nano_32$", name) for name in without), without


def test_aliases_are_models_with_the_same_weights():
    for alias, name in aliases().items():
        assert get_pretrained_cfg(alias).url == get_pretrained_cfg(name).url == find(alias).url


def test_every_detector_and_segmentor_has_its_configuration():
    for item in ALL:
        if item.task == "classification":
            assert item.config is None
        else:
            path = ROOT / "configs" / item.task / f"{item.config}.py"
            assert path.is_file(), path
            assert item.backbone in path.read_text(encoding="utf-8"), path
            assert item.name.startswith(f"{item.config}.")


def test_no_two_are_the_same_file():
    assert max(Counter(item.url for item in ALL).values()) == 1
    assert max(Counter(item.file_name for item in ALL).values()) == 1


@pytest.mark.parametrize("item", ALL, ids=lambda item: item.name)
def test_facts_are_plausible(item):
    assert MAIN_METRIC[item.task] in item.metrics
    assert set(item.metrics) <= METRICS[item.task]
    assert all(20 < value < 98 for key, value in item.metrics.items() if key not in ("mask_ap75",))
    assert item.metrics.get("mask_ap", 0) < item.metrics.get("box_ap", 1)
    assert item.url.startswith("https://")
    assert item.license in ("mit", "apache-2.0", "none stated")
    assert item.weights in ("model", "model_ema", "state_dict")
    assert item.sha256 is None or re.fullmatch("[0-9a-f]{64}", item.sha256)
    assert item.suffix in (".pth", ".ckpt")


def test_published_parameter_counts_are_those_of_the_models():
    """In millions, rounded or cut off; PlainMamba's leave the classifier out."""
    for item in ALL:
        if item.task == "classification" and item.params_m:
            data = golden(item.family, item.backbone)
            count = data["params"]
            if item.family == "plainmamba":
                count -= sum(entry[1][0] * (entry[1] + [1])[1] for entry in data["state_dict"] if "head." in entry[0])
            assert abs(count / 1e6 - item.params_m) < (1 if item.params_m == int(item.params_m) else 0.1), item.name


def test_published_sizes_fit_the_weights():
    """A file holds at least its weights, of 4 bytes a parameter."""
    for item in ALL:
        if item.size and item.task == "classification":
            count = golden(item.family, item.backbone)["params"]
            megabytes = float(item.size.split()[0]) * (1.048576 if item.size.endswith("MiB") else 1)
            assert 4 * count / 1e6 * 0.99 < megabytes < 4.5 * 4 * count / 1e6, item.name


def test_sizes_are_compared_as_they_were_rounded():
    small = find("plainmamba_l1.in1k")
    assert small.size == "30.3 MB"
    assert small.has_size(30_250_000)
    assert small.has_size(30_399_999)
    assert not small.has_size(30_100_000)
    assert not small.has_size(15_000_000)
    assert find("vmamba_tiny.in1k").has_size(1)  # nothing is stated


def test_names_are_found_with_and_without_tag():
    assert find("vmamba_tiny_s1l8").name == "vmamba_tiny_s1l8.in1k"
    assert find("vmamba_tiny").name == "vmamba_tiny_s1l8.in1k"
    assert find("vanilla_vmamba_base").name == "vanilla_vmamba_base.in1k"
    assert find("vanilla_vmamba_base.dp05_in1k").metrics == {"top1": 83.2}
    assert find("plainmamba_l1_retinanet_1x").task == "detection"
    for item in ALL:
        assert find(item.name) is item


@pytest.mark.parametrize(
    ("name", "near"), [("vmamba_tiny_s1l9", "vmamba_tiny_s1l8.in1k"), ("spatialmamba_tinny.in1k", "spatialmamba_tiny")]
)
def test_unknown_names(name, near):
    with pytest.raises(UserError) as error:
        find(name)
    assert f"no published weights are called '{name}'; did you mean {near}" in str(error.value)


def test_timm_lists_them():
    listed = timm.list_pretrained("*")
    assert {item.name for item in ALL if item.task == "classification"} <= set(listed)


def test_the_readme_of_checkpoints_is_current():
    """Make it anew with: vmamba weights list --markdown > checkpoints/README.md"""
    assert (ROOT / "checkpoints" / "README.md").read_text(encoding="utf-8") == table.readme()

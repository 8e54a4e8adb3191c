"""The published checkpoints: ``manifest.yaml`` as typed values."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Literal, get_args
from urllib.parse import unquote, urlsplit

import yaml

from vmamba.errors import UserError, nearest

Task = Literal["classification", "detection", "segmentation"]
Host = Literal["hub", "drive", "web"]

NONE_STATED = "none stated"
"""The licence of weights that were published without one."""

_UNITS = {"B": 1, "MB": 10**6, "MiB": 2**20}


@dataclass(frozen=True)
class Checkpoint:
    """One published file; the figures are its authors'.

    Args:
        name: ``MODEL.TAG`` of a classifier, ``CONFIG.DATASET`` of a detector or segmentor.
        task: What it was trained for.
        family: Module of the family in :mod:`vmamba.models`.
        backbone: Registered name of the model.
        url: The file, or its page on Google Drive.
        weights: Key in the file under which the weights to take are.
        license: Of the weights, as an SPDX-like word, or :data:`NONE_STATED`.
        paper: arXiv number.
        title: Of the paper.
        repository: Where the code was published.
        hub: Repository on huggingface.co, if it is there.
        file: Path in that repository.
        suffix: Of the file's name.
        config: Name of the configuration of a detector or segmentor.
        size: Of the file, as stated.
        sha256: Of the file, once known.
        params_m: Millions of parameters, as published.
        gflops: As published, by the authors' rule.
        metrics: Percent by name: top1, top5, box_ap, mask_ap, miou_ss, miou_ms, ...
        license_note: What a reader should know of the licence.
        note: What a reader should know of the checkpoint.
    """

    name: str
    task: Task
    family: str
    backbone: str
    url: str
    weights: str
    license: str
    paper: str
    title: str
    repository: str
    hub: str | None = None
    file: str | None = None
    suffix: str = ".pth"
    config: str | None = None
    size: str | None = None
    sha256: str | None = None
    params_m: float | None = None
    gflops: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    license_note: str | None = None
    note: str | None = None

    @property
    def host(self) -> Host:
        """How it is fetched: from the Hugging Face hub, from Google Drive, or by plain HTTP."""
        if self.hub:
            return "hub"
        return "drive" if urlsplit(self.url).hostname == "drive.google.com" else "web"

    @property
    def is_folder(self) -> bool:
        """Whether the link is to a folder that holds the file among others."""
        return self.host == "drive" and "/folders/" in self.url

    @property
    def file_name(self) -> str:
        """The name it has here: published names neither tell what is in a file nor differ from each other."""
        return self.name + self.suffix

    @property
    def page(self) -> str:
        """The page to open in a browser."""
        return f"https://huggingface.co/{self.hub}" if self.hub else self.url

    def has_size(self, count: int) -> bool:
        """Whether a file of ``count`` bytes may be the published one, whose size may be stated in round figures."""
        if self.size is None:
            return True
        figure, unit = self.size.split()
        decimals = len(figure.partition(".")[2])
        # Some round and some cut off: one unit of the last figure, either way.
        tolerance = 0.0 if unit == "B" else 10.0**-decimals * _UNITS[unit]
        return abs(count - float(figure) * _UNITS[unit]) <= tolerance


def find(name: str) -> Checkpoint:
    """The checkpoint of that name; without a tag, the first that the manifest has.

    Raises:
        UserError: if there is none, with the names that are near.
    """
    known = checkpoints()
    if name in known:
        return known[name]
    base, dot, tag = name.partition(".")
    if base in aliases():
        return find(aliases()[base] + dot + tag)
    tagged = [other for other in known if other.rpartition(".")[0] == name]
    if tagged:
        return known[tagged[0]]
    raise UserError(f"no published weights are called '{name}'{nearest(name, known) or '; see vmamba weights list'}")


@functools.cache
def checkpoints() -> Mapping[str, Checkpoint]:
    """All published checkpoints by name, in the manifest's order."""
    found: dict[str, Checkpoint] = {}
    for family, facts in _families().items():
        shared = {key: value for key, value in facts.items() if key not in (*get_args(Task), "aliases")}
        for task in get_args(Task):
            for name, own in facts.get(task, {}).items():
                found[name] = _checkpoint(name, {**shared, "family": family, "task": task, **own})
    return found


@functools.cache
def aliases() -> Mapping[str, str]:
    """Short names of models, with the names they stand for."""
    return {alias: name for facts in _families().values() for alias, name in facts.get("aliases", {}).items()}


@functools.cache
def _families() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("manifest.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the same rules, in C


def _checkpoint(name: str, facts: dict[str, Any]) -> Checkpoint:
    facts.setdefault("backbone", name.partition(".")[0])
    if "hub" in facts:
        facts["url"] = f"https://huggingface.co/{facts['hub']}/resolve/main/{facts['file']}"
    suffix = PurePosixPath(unquote(urlsplit(facts["url"]).path)).suffix
    if suffix:
        facts.setdefault("suffix", suffix)
    return Checkpoint(name=name, **facts)

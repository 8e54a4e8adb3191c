"""A machine of one's own for each test: empty caches, no variables, nothing beyond this host."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from tests.weights.servers import FileServer, Hub
from vmamba.weights import places


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Folder that holds the caches; commands run in an empty one beside it."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("VMAMBA_CHECKPOINTS", "VMAMBA_WEIGHTS_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(places, "_SOURCES", tmp_path / "sources")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hf" / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture
def cache(home) -> Path:
    """Where downloads go."""
    return home / "torch" / "hub" / "checkpoints" / "vmamba"


@pytest.fixture
def server():
    with FileServer() as running:
        yield running


@pytest.fixture
def mirror(server, monkeypatch) -> FileServer:
    """The server, named as the mirror."""
    monkeypatch.setenv("VMAMBA_WEIGHTS_MIRROR", server.url)
    return server


@pytest.fixture
def hub(monkeypatch):
    """The Hugging Face hub, here."""
    with Hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield running

"""A machine of one's own for each test: empty caches, no variables, nothing beyond this host."""

import errno
import os
import resource
from collections.abc import Callable
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
def full_at_a_million():
    """Lets no file of this process grow beyond a million bytes, as a full disk or a quota would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def forbid(monkeypatch) -> Callable[[Path], None]:
    """Lets nobody open a file, not even root, whom no permission keeps from it."""
    forbidden = set()

    def opened(path: Path, *args, **kwargs):
        if path in forbidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)

    def forbid(path: Path) -> None:
        path.chmod(0)
        forbidden.add(path)

    return forbid


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

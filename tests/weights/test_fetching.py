"""From a name to a file: from the folders, the caches, a mirror, a source; and what is remembered of it."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.weights import published
from vmamba.errors import UserError
from vmamba.weights import fetch, fetch_into, find, places

NAME = "vmamba_tiny_s1l8.in1k"
FILE = f"{NAME}.pth"
DRIVE_FILE, DRIVE_FOLDER = "spatialmamba_tiny.in1k", "msvmamba_nano.in1k"
HUB_NAME = "plainmamba_l3_mask_rcnn_1x.coco"


def content(value: float | list[float]) -> bytes:
    """A file that torch wrote, small unless the value is a long list."""
    torch.save({"model": {"x": torch.tensor([value])}}, "made.pth")
    return Path("made.pth").read_bytes()


def complaint(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        fetch(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


def put(folder: Path, name: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


# ---------------------------------------------------------------------------------------------------------------------
# Where files are found
# ---------------------------------------------------------------------------------------------------------------------


def test_from_the_cache(cache):
    path = put(cache, FILE, content(1))
    assert fetch(NAME) == path


@pytest.mark.parametrize("checkout", ["work", "sources"])
def test_from_checkpoints_of_a_checkout(tmp_path, checkout):
    """The one that the command is run in, or that the package is imported from."""
    put(tmp_path / checkout, "pyproject.toml", b"")
    path = put(tmp_path / checkout / "checkpoints", FILE, content(1))
    assert fetch(NAME) == path


def test_a_folder_called_checkpoints_elsewhere_is_nothing():
    put(Path.cwd() / "checkpoints", FILE, content(1))
    assert places.local(find(NAME)) is None


def test_from_the_named_folder_first(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("VMAMBA_CHECKPOINTS", str(tmp_path / "mine"))
    data = content(1)
    put(cache, FILE, data)
    path = put(tmp_path / "mine", FILE, data)
    assert fetch(NAME) == path


def test_converted_before_published(cache):
    from safetensors.torch import save_file

    put(cache, FILE, content(1))
    save_file({"x": torch.ones(1)}, cache / f"{NAME}.safetensors")
    assert fetch(NAME).suffix == ".safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Mirror and source
# ---------------------------------------------------------------------------------------------------------------------


def test_from_a_mirror_into_the_cache(mirror, cache):
    mirror.files[FILE] = content(1)
    assert fetch(NAME) == cache / FILE
    assert (cache / FILE).read_bytes() == mirror.files[FILE]
    fetch(NAME)
    assert len(mirror.requests) == 1


@pytest.mark.parametrize("name", [HUB_NAME, DRIVE_FILE, DRIVE_FOLDER])
def test_a_mirror_serves_what_was_published_anywhere(mirror, cache, name):
    file = find(name).file_name
    mirror.files[file] = content(1)
    assert fetch(name) == cache / file


def test_a_mirror_may_have_converted_files(mirror, cache):
    from safetensors.torch import save

    mirror.files[f"{NAME}.safetensors"] = save({"x": torch.ones(1)})
    assert fetch(NAME) == cache / f"{NAME}.safetensors"


def test_into_the_named_folder(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("VMAMBA_CHECKPOINTS", str(tmp_path / "mine"))
    mirror.files[FILE] = content(1)
    assert fetch(NAME) == tmp_path / "mine" / FILE


def test_from_its_source(server, cache):
    server.files["releases/vssm.pth"] = content(1)
    assert fetch(at_source(server.url)) == cache / FILE


def at_source(url: str, **facts):
    return dataclasses.replace(find(NAME), url=f"{url}/releases/vssm.pth", **facts)


def test_from_its_source_if_the_mirror_has_it_not(mirror, cache, caplog):
    mirror.files["releases/vssm.pth"] = content(1)
    assert fetch(at_source(mirror.url)) == cache / FILE
    assert "not at the mirror" in caplog.text


def test_a_mirror_has_to_be_a_web_address(monkeypatch):
    monkeypatch.setenv("VMAMBA_WEIGHTS_MIRROR", "/mnt/weights")
    assert "VMAMBA_WEIGHTS_MIRROR=/mnt/weights is no http:// or https:// address" in complaint(NAME)


def test_no_network(cache):
    message = complaint(at_source("http://127.0.0.1:9"))
    assert f"cannot get {NAME}: http://127.0.0.1:9/releases/vssm.pth could not be reached" in message
    assert f"put the file into {cache} as {FILE}, or name a mirror in VMAMBA_WEIGHTS_MIRROR" in message


# ---------------------------------------------------------------------------------------------------------------------
# Hash and size
# ---------------------------------------------------------------------------------------------------------------------


def test_wrong_hash(server, cache):
    server.files["releases/vssm.pth"] = content(1)
    message = complaint(at_source(server.url, sha256="0" * 64))
    assert f"is not the published {NAME}: its SHA-256 is" in message
    assert "expected 0000" in message
    assert not list(cache.iterdir())


def test_right_hash(server, cache):
    import hashlib

    server.files["releases/vssm.pth"] = content(1)
    expected = hashlib.sha256(server.files["releases/vssm.pth"]).hexdigest()
    assert fetch(at_source(server.url, sha256=expected)) == cache / FILE


def test_wrong_size(server, cache):
    server.files["releases/vssm.pth"] = content(1)
    message = complaint(at_source(server.url, size="30.3 MB"))
    assert f"but the published {NAME} has 30.3 MB" in message
    assert not (cache / FILE).exists()
    assert fetch(at_source(server.url, size="30.3 MB"), accept=True) == cache / FILE
    fetch(at_source(server.url, size="30.3 MB"))  # accepted once is accepted


def test_a_change_is_noticed(cache):
    path = put(cache, FILE, content(1))
    fetch(NAME)
    fetch(NAME)
    put(cache, FILE, content(2))
    message = complaint(NAME)
    assert f"{path} HAS CHANGED: its SHA-256 is" in message
    assert f"vmamba weights verify {NAME} --accept" in message
    assert fetch(NAME, accept=True) == path
    fetch(NAME)
    put(cache, FILE, content(1))
    assert "HAS CHANGED" in complaint(NAME)


def test_a_change_at_the_source_is_noticed(mirror, cache):
    mirror.files[FILE] = content(1)
    fetch(NAME).unlink()
    mirror.files[FILE] = content(2)
    message = complaint(NAME)
    assert f"{mirror.url}/{FILE} HAS CHANGED" in message
    assert "when it was first seen on 2" in message
    assert f"vmamba weights download {NAME} --accept" in message
    assert not (cache / FILE).exists()
    assert fetch(NAME, accept=True) == cache / FILE


def test_the_same_file_elsewhere_is_the_same(cache, tmp_path):
    put(cache, FILE, content(1))
    fetch(NAME)
    put(tmp_path / "other", FILE, content(1))
    assert fetch(NAME, folder=tmp_path / "other") == tmp_path / "other" / FILE
    put(tmp_path / "other", FILE, content(2))
    assert "HAS CHANGED" in complaint(NAME, folder=tmp_path / "other")


def legacy_content(value: float) -> bytes:
    """What versions of torch before 1.6 wrote: pickles, and then the bytes of the tensors."""
    torch.save({"model": {"x": torch.tensor([value])}}, "legacy.pth", _use_new_zipfile_serialization=False)
    return Path("legacy.pth").read_bytes()


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04 and no end", b"<html>", b"\x80\x02 and no end", "a legacy file without its end"]
)
def test_what_is_no_checkpoint_is_not_remembered(cache, data, accept):
    put(cache, FILE, data if isinstance(data, bytes) else legacy_content(1)[:-2])
    assert "is truncated, corrupt or no checkpoint at all" in complaint(NAME, accept=accept)
    put(cache, FILE, content(1))
    fetch(NAME)


def test_legacy_files_are_taken(cache):
    path = put(cache, FILE, legacy_content(1))
    assert fetch(NAME) == path


def test_accepting_a_change_takes_a_whole_file(cache):
    put(cache, FILE, content(1))
    fetch(NAME)
    put(cache, FILE, content(2)[:-20])
    assert "truncated" in complaint(NAME, accept=True)
    put(cache, FILE, content(1))
    fetch(NAME)


@pytest.mark.parametrize("name", [FILE, f"{NAME}.safetensors"])
def test_a_file_that_may_not_be_read(name, cache, forbid):
    forbid(put(cache, name, content(1)))
    assert complaint(NAME) == f"cannot read {cache / name}: Permission denied"


def test_a_truncated_download_of_a_server_that_says_nothing(mirror, cache):
    mirror.files[FILE] = content(1)[:-20]
    assert "truncated" in complaint(NAME)
    assert not (cache / FILE).exists()


def test_a_record_that_cannot_be_read(cache):
    put(cache, FILE, content(1))
    put(cache, "record.json", b"{")
    assert f"cannot read {cache / 'record.json'}, which remembers the hashes" in complaint(NAME)


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch, caplog):
    """Weights can be used where nothing can be remembered."""
    monkeypatch.setenv("VMAMBA_CHECKPOINTS", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCH_HOME", str(put(tmp_path, "a file", b"")))
    path = put(tmp_path / "mine", FILE, content(1))
    assert fetch(NAME) == path
    assert "hashes of weights are not remembered" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face hub
# ---------------------------------------------------------------------------------------------------------------------


def on_hub(checkpoint) -> str:
    return f"{checkpoint.hub}/resolve/main/{checkpoint.file}"


def test_from_the_hub(hub, home):
    checkpoint = find(HUB_NAME)
    hub.files[on_hub(checkpoint)] = content(1)
    path = fetch(HUB_NAME)
    assert path.is_relative_to(home / "hf")
    assert path.read_bytes() == content(1)
    asked = len(hub.requests)
    assert fetch(HUB_NAME) == path
    assert len(hub.requests) == asked
    pins = json.loads(places.cache().joinpath("record.json").read_text())["pins"]
    assert pins[f"{HUB_NAME}.pth"]["source"] == checkpoint.url


def test_from_the_hub_into_a_folder(hub, tmp_path):
    hub.files[on_hub(find(HUB_NAME))] = content(1)
    for _ in range(2):
        path = fetch_into(tmp_path / "mine", HUB_NAME)
        assert path == tmp_path / "mine" / f"{HUB_NAME}.pth"
        assert path.read_bytes() == content(1)
        assert list((tmp_path / "mine").iterdir()) == [path]


def test_a_full_disk_leaves_nothing_of_a_copy(cache, tmp_path, request):
    put(cache, FILE, content([0.0] * 300_000))
    request.getfixturevalue("full_at_a_million")
    with pytest.raises(UserError, match=f"cannot copy .*{FILE} to .*mine: File too large"):
        fetch_into(tmp_path / "mine", NAME)
    assert not list((tmp_path / "mine").iterdir())


def test_from_the_cache_into_a_folder(cache, tmp_path):
    put(cache, FILE, content(1))
    assert fetch_into(tmp_path / "mine", NAME) == tmp_path / "mine" / FILE
    assert (tmp_path / "mine" / FILE).read_bytes() == content(1)


def test_not_on_the_hub(hub):
    message = complaint(HUB_NAME)
    assert f"cannot get {HUB_NAME} from https://huggingface.co/ChenhongyiYang/PlainMamba" in message
    assert "404" in message


# ---------------------------------------------------------------------------------------------------------------------
# Google Drive
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "what"), [(DRIVE_FILE, "the file"), (DRIVE_FOLDER, "its checkpoint")])
def test_without_gdown_it_is_said_what_to_do(name, what, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)  # as if it were not installed
    message = complaint(name)
    assert "needs gdown (pip install gdown)" in message
    assert f"open {find(name).url}, download {what}, and run: vmamba weights import FILE --as {name}" in message


def test_gdown_is_used_as_it_wants_to_be(server, tmp_path):
    """It takes any address; Drive itself cannot be had here."""
    gdown = pytest.importorskip("gdown", reason="gdown is optional")
    from vmamba.weights import drive

    server.files["file"] = content(1)
    drive.get(gdown, f"{server.url}/file", tmp_path / "weights.pth.part")
    assert (tmp_path / "weights.pth.part").read_bytes() == content(1)
    assert not list(tmp_path.glob("*.part?*"))


class Gdown:
    """The real one's manner: it takes a file of the name for the whole one."""

    def download(self, url: str, output: str, **options: bool) -> None:
        if not Path(output).exists():
            Path(output).write_bytes(content(1))


def test_the_start_of_a_file_is_not_taken_for_all_of_it(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", Gdown())
    put(cache, f"{DRIVE_FILE}.pth.part", content(1)[:100])
    checkpoint = dataclasses.replace(find(DRIVE_FILE), size=None)
    assert fetch(checkpoint).read_bytes() == content(1)


@dataclasses.dataclass
class Listed:
    """What gdown says of a file in a folder."""

    path: str
    id: str = "1"


def test_the_one_file_of_a_folder_that_can_hold_weights():
    from vmamba.weights.drive import _only_weights

    checkpoint = find(DRIVE_FOLDER)
    files = [Listed("log.txt"), Listed("a/best_ckpt.pth", "2")]
    assert _only_weights(checkpoint, files).id == "2"
    for several in ([*files, Listed("latest_ckpt.pth")], files[:1], []):
        with pytest.raises(UserError, match="which it is cannot be told; open https://drive") as error:
            _only_weights(checkpoint, several)
        assert all(file.path in str(error.value) for file in several[1:])


# ---------------------------------------------------------------------------------------------------------------------
# timm
# ---------------------------------------------------------------------------------------------------------------------


def test_timm_gets_them_from_a_mirror(mirror, cache):
    checkpoint = find("msvmamba_nano")
    published.save(checkpoint, Path("file"))
    mirror.files[checkpoint.file_name] = Path("file").read_bytes()
    model = timm.create_model(checkpoint.name, pretrained=True)
    assert (cache / checkpoint.file_name).is_file()
    assert torch.equal(model.head.fc.bias, published.tensors(checkpoint)["classifier.head.bias"])
    assert model.pretrained_cfg["license"] == "none stated"


def test_timm_gets_them_from_the_hub(hub):
    checkpoint = find("vim_tiny_rope_patch16_224")
    published.save(checkpoint, Path("file"))
    hub.files[on_hub(checkpoint)] = Path("file").read_bytes()
    model = timm.create_model(checkpoint.name, pretrained=True)
    assert torch.equal(model.head.fc.bias, published.tensors(checkpoint)["head.bias"])


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_timm_takes_short_names(mirror, cache):
    published.save(find(NAME), Path("file"))
    mirror.files[FILE] = Path("file").read_bytes()
    with torch.device("meta"):
        timm.create_model("vmamba_tiny", pretrained=True)
    assert (cache / FILE).is_file()


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("kind", ["file", "url", "state_dict"])
def test_timm_takes_other_weights_if_they_are_named(mirror, kind):
    """A file, a URL and a state dict of the caller go before those of the manifest, which cannot be had here."""
    checkpoint = find("vim_tiny_rope_patch16_224.in1k")
    path = published.save(checkpoint, Path("own.pth"))
    mirror.files["own.pth"] = path.read_bytes()
    named = {"file": str(path), "url": f"{mirror.url}/own.pth", "state_dict": torch.load(path)}
    with torch.device("meta"):
        timm.create_model(checkpoint.name, pretrained=True, pretrained_cfg_overlay={kind: named[kind]})
    assert [path for path, _ in mirror.requests] == (["own.pth"] if kind == "url" else [])


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_timm_takes_another_repository_if_it_is_named(hub):
    """By its own way to the hub."""
    path = published.save(find("msvmamba_nano"), Path("own.pth"))
    hub.files["me/own/resolve/main/own.pth"] = path.read_bytes()
    overlay = {"hf_hub_id": "me/own", "hf_hub_filename": "own.pth"}
    with torch.device("meta"):
        timm.create_model("msvmamba_nano", pretrained=True, pretrained_cfg_overlay=overlay)
    assert ("me/own/resolve/main/own.pth", None) in hub.requests


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_timm_names_a_folder(mirror, tmp_path):
    published.save(find(NAME), Path("file"))
    mirror.files[FILE] = Path("file").read_bytes()
    with torch.device("meta"):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / FILE).is_file()


def test_another_model_under_this_name(cache):
    published.save(find("vmamba_tiny_s2l5"), cache / FILE)
    with torch.device("meta"), pytest.raises(UserError) as error:
        timm.create_model(NAME, pretrained=True)
    assert str(error.value).startswith(f"{cache / FILE} for vmamba_tiny_s1l8: does not fit this model: ")

"""`vmamba weights`, through the command."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch

from tests.running import ROOT, one_line, vmamba
from tests.weights import published
from tests.weights.conftest import cache, home, hub, mirror, server  # noqa: F401  (fixtures)
from vmamba.weights import checkpoints, find

NAME = "msvmamba_nano.in1k"
FILE = f"{NAME}.pth"


def weights(*arguments: object):
    result = vmamba("weights", *arguments)
    assert result.status == 0, result.err
    return result.out


def content(value: object) -> bytes:
    torch.save({"model": {"x": torch.tensor(value)}}, "made.pth")
    return Path("made.pth").read_bytes()


def test_list():
    lines = weights("list").splitlines()
    assert lines[0].split() == ["name", "published", "accuracy", "size", "licence", "where"]
    assert [line.split()[0] for line in lines[1:]] == list(checkpoints())


def test_list_some(cache):  # noqa: F811
    published.save(find(NAME), cache / FILE)
    (line,) = weights("list", "msvmamba_nano").splitlines()[1:]
    assert line.split() == [NAME, "top-1", "77.3", "-", "none", "stated", str(cache / FILE)]
    found = weights("list", "*_l1_*", "--task", "detection")
    assert [line.split()[0] for line in found.splitlines()[1:]] == [
        "plainmamba_l1_mask_rcnn_1x.coco",
        "plainmamba_l1_retinanet_1x.coco",
    ]


def test_list_nothing():
    message = one_line(vmamba("weights", "list", "vmamba_tiny_s1l9"))
    assert "no weights match 'vmamba_tiny_s1l9'; did you mean vmamba_tiny_s1l8.in1k" in message


def test_download_verify_accept(mirror, cache):  # noqa: F811
    mirror.files[FILE] = content(1)
    assert weights("download", NAME).strip() == f"{NAME}: {cache / FILE}"
    assert str(cache / FILE) in weights("verify")
    assert str(cache / FILE) in weights("verify", NAME)
    times = os.stat(cache / FILE)
    (cache / FILE).write_bytes(content(2))
    os.utime(cache / FILE, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    result = vmamba("weights", "verify")
    assert result.status == 2
    assert "HAS CHANGED" in result.err
    assert "1 of 1 files are not what they were or should be" in result.err
    weights("verify", "--accept")
    weights("verify")


def test_download_to_a_folder(mirror, tmp_path):  # noqa: F811
    mirror.files[FILE] = content(1)
    weights("download", NAME, "--to", tmp_path / "mine")
    assert (tmp_path / "mine" / FILE).read_bytes() == content(1)


def test_verify_reads_the_published_file_beside_the_converted_one(tmp_path, cache):  # noqa: F811
    source = published.save(find(NAME), tmp_path / "best_ckpt.pth")
    weights("import", source, "--as", NAME)
    weights("convert", NAME)
    verified = [line.split()[-1] for line in weights("verify", NAME).splitlines()]
    assert verified == [str(cache / f"{NAME}.safetensors"), str(cache / FILE)]
    (cache / FILE).write_bytes(content(2))
    result = vmamba("weights", "verify")
    assert f"{cache / FILE} HAS CHANGED" in result.err
    assert "1 of 2 files are not what they were or should be" in result.err


def test_verify_with_a_broken_record(cache):  # noqa: F811
    published.save(find(NAME), cache / FILE)
    (cache / "record.json").write_text("{")
    assert f"cannot read {cache / 'record.json'}, which remembers" in one_line(vmamba("weights", "verify"))


def test_verify_what_is_not_here():
    assert "no weights are here yet" in weights("verify")
    assert f"{NAME} is not here; get it: vmamba weights download {NAME}" in one_line(vmamba("weights", "verify", NAME))


def test_import_convert_push(tmp_path, cache):  # noqa: F811
    source = published.save(find(NAME), tmp_path / "best_ckpt.pth")
    assert weights("import", source, "--as", "msvmamba_nano").strip() == f"{NAME}: {cache / FILE}"
    assert weights("convert", NAME).strip() == f"{NAME}: {cache / NAME}.safetensors"
    out = weights("push", NAME, "--to", "me/nano")
    assert "to https://huggingface.co/me/nano:" in out
    assert "model.safetensors  27." in out
    assert "config.json" in out
    assert "license_name: none-stated" in out
    assert out.endswith("nothing was uploaded; add --upload to do it\n")


def test_push_uploads_when_told_to(cache, hub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    name = "plainmamba_l1_retinanet_1x.coco"
    published.save(find(name), cache / f"{name}.pth")
    out = weights("push", name, "--to", "me/det", "--upload")
    assert f"uploaded: {hub.url}/me/det/commit/" in out
    assert set(hub.commits[0]) == {"README.md", "model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: ACTION"),
        (("lst",), "invalid choice: 'lst' (choose from"),
        (("downlod",), "did you mean download?"),
        (("download",), "the following arguments are required: NAME"),
        (("download", "vim_tiny_patch16_22"), "no published weights are called 'vim_tiny_patch16_22'; did you mean"),
        (("import", "x.pth"), "the following arguments are required: --as"),
        (("import", "x.pth", "--as", NAME), "there is no file x.pth"),
        (("import", "x.pth", "--as", "msvmamba_nanno"), "did you mean msvmamba_nano.in1k"),
        (("list", "--tasks"), "vmamba weights list does not know '--tasks'; did you mean --task?"),
        (("download", NAME, "--too=other/folder"), "does not know '--too=other/folder'; did you mean --to?"),
        (("push", NAME, "--to", "me"), "'me' is no name of a repository such as OWNER/NAME"),
        (("push", NAME, "--to", "me/a b"), "'me/a b' is no name of a repository such as OWNER/NAME"),
    ],
)
def test_mistakes(arguments, message):
    assert message in one_line(vmamba("weights", *arguments))


def start_download() -> tuple[subprocess.Popen, int]:
    """The command in a process of its own, and the terminal it thinks its errors and bars go to."""
    command = [sys.executable, "-m", "vmamba.cli.main", "weights", "download", NAME]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    return process, ours


def read_all(terminal: int) -> str:
    """What was written to a terminal whose programs have ended."""
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 10_000):
            shown += chunk
    return shown.decode()


def test_two_processes_and_a_terminal(mirror, cache):  # noqa: F811
    """One downloads and shows how far it is; the other says that it waits, and finds the file."""
    mirror.files[FILE] = content([0.5] * 1_000_000)
    mirror.go_on = threading.Event()
    started = {process.stdout: (process, terminal) for process, terminal in (start_download(), start_download())}
    (first_to_speak, *_), _, _ = select.select(list(started), [], [], 120)
    assert first_to_speak.readline() == f"another process is getting {FILE}; waiting for it\n"
    mirror.go_on.set()
    waiting, _ = started.pop(first_to_speak)
    ((loading, terminal),) = started.values()
    for process in (waiting, loading):
        assert process.communicate(timeout=120)[0] == f"{NAME}: {cache / FILE}\n"
        assert process.returncode == 0
    assert (cache / FILE).read_bytes() == mirror.files[FILE]
    assert len(mirror.requests) == 1
    assert f"{FILE}: " in (shown := read_all(terminal))
    assert "3.82M/3.82M" in shown

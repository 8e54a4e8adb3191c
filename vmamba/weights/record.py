"""What each file was when it was first seen, so that a change is noticed.

Most weights were published without a hash. The first file that arrives under a name is therefore remembered, in
`record.json` beside the cache, and every later one has to be the same.
"""

import datetime
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from vmamba.errors import UserError
from vmamba.weights import places
from vmamba.weights.manifest import Checkpoint

_logger = logging.getLogger(__name__)

_CHUNK = 1 << 20


class RecordError(UserError):
    """What was remembered of files cannot be read."""


def check(
    checkpoint: Checkpoint,
    path: Path,
    source: str,
    target: Path | None = None,
    accept: bool = False,
    anew: bool = False,
) -> str:
    """Compare a file with what was published and with what was seen before; remember it if it is the first.

    Args:
        checkpoint: What the file should be.
        path: The file.
        source: Where it came from, to be remembered with it.
        target: The name it is to take, if it does not have it yet; its suffix tells published files from converted.
        accept: Take the file even if it differs, as long as it is whole, and remember it from now on.
        anew: Read it even if its size and time of change are those of a file that was read before.

    Returns:
        Its SHA-256.

    Raises:
        RecordError: if what was remembered cannot be read.
        UserError: if it differs, is not whole, or cannot be read.
    """
    final = target or path
    key = str(final.absolute())
    # Converted files differ each time they are made, published ones are the same wherever they lie.
    name = checkpoint.file_name if final.suffix == checkpoint.suffix else key
    content = _read()
    stat = path.stat()
    size, time, digest = content["read"].get(key, (None, None, ""))
    if anew or (size, time) != (stat.st_size, stat.st_mtime_ns):
        digest = sha256(path)
    pin = content["pins"].get(name)
    if not accept:
        _compare(checkpoint, _File(source, final.suffix, stat.st_size, digest, arriving=target is not None), pin)
    if pin is None or pin["sha256"] != digest:
        _require_whole(path, final.suffix, source)
    read = [stat.st_size, stat.st_mtime_ns, digest]

    def remember(content: dict[str, dict]) -> None:
        content["read"][key] = read
        if accept or name not in content["pins"]:
            today = datetime.date.today().isoformat()
            content["pins"][name] = {"sha256": digest, "size": stat.st_size, "source": source, "since": today}

    if pin is None or pin["sha256"] != digest or content["read"].get(key) != read:
        _change(remember)
    return digest


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


@dataclass(frozen=True)
class _File:
    """What is compared; ``arriving`` if it is being downloaded or imported."""

    source: str
    suffix: str
    size: int
    sha256: str
    arriving: bool


def _compare(checkpoint: Checkpoint, file: _File, pin: dict[str, Any] | None) -> None:
    remedy = f"if you trust this one: vmamba weights {_command(checkpoint, file)} --accept"
    is_published = file.suffix == checkpoint.suffix
    if is_published and checkpoint.sha256 not in (None, file.sha256):
        raise UserError(
            f"{file.source} is not the published {checkpoint.name}: its SHA-256 is {file.sha256}, expected "
            f"{checkpoint.sha256}; {remedy}"
        )
    if pin is not None and pin["sha256"] != file.sha256:
        raise UserError(
            f"{file.source} HAS CHANGED: its SHA-256 is {file.sha256}, but that of {checkpoint.name} was "
            f"{pin['sha256']} when it was first seen on {pin['since']} ({pin['source']}); {remedy}"
        )
    if pin is None and is_published and not checkpoint.has_size(file.size):
        raise UserError(
            f"{file.source} has {file.size:,} bytes, but the published {checkpoint.name} has {checkpoint.size}: it is "
            f"another file, or its authors have replaced it; {remedy}"
        )


def _command(checkpoint: Checkpoint, file: _File) -> str:
    if not file.arriving:
        return f"verify {checkpoint.name}"
    is_remote = file.source.startswith(("http://", "https://"))
    return f"download {checkpoint.name}" if is_remote else f"import {file.source} --as {checkpoint.name}"


def _require_whole(path: Path, suffix: str, source: str) -> None:
    """A file that was cut off before it came here must not be what later ones are compared with."""
    with path.open("rb") as file:
        start = file.read(2)
    if suffix == places.CONVERTED_SUFFIX:
        whole = _is_safetensors(path)
    elif start == b"PK":
        whole = zipfile.is_zipfile(path)  # whose table of contents is at the end
    else:
        whole = start[:1] == b"\x80" and _loads(path)  # a pickle, as old versions of torch wrote
    if not whole:
        raise UserError(f"{source} is truncated, corrupt or no checkpoint at all ({path.stat().st_size:,} bytes)")


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        return False


def _loads(path: Path) -> bool:
    """Whether a file can be read to its end, where nothing shorter tells that it has one."""
    from vmamba.models import _checkpoint  # not at the top: the models get their weights from here

    try:
        _checkpoint.read(path)
        return True
    except _checkpoint.CheckpointError:
        return False


def _path() -> Path:
    return places.cache() / "record.json"


def _read() -> dict[str, dict]:
    try:
        content = json.loads(_path().read_text(encoding="utf-8"))
        return {"pins": dict(content["pins"]), "read": dict(content["read"])}
    except (FileNotFoundError, NotADirectoryError):
        return {"pins": {}, "read": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"cannot read {_path()}, which remembers the hashes of weights: {error}; remove it to start a new one"
        ) from error


def _change(update: Callable[[dict[str, dict]], None]) -> None:
    """Let ``update`` change the record, and write it whole."""
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            content = _read()
            update(content)
            content["read"] = {file: seen for file, seen in content["read"].items() if Path(file).exists()}
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        # Weights on a machine whose folders are all read-only can be used nevertheless.
        _logger.warning(f"hashes of weights are not remembered: cannot write {path}: {error.strerror or error}")

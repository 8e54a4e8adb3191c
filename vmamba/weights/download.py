"""One file over HTTP: it goes on where it stopped, and takes its name only when it is whole and checked."""

import http.client
import itertools
import json
import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from tqdm import tqdm

from vmamba.errors import UserError

_logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
_SILENCE = 30  # seconds after which a server that sends nothing is given up

Check = Callable[[Path], Any]
"""Raises UserError unless the file is what it should be."""


class Unavailable(UserError):
    """The source cannot be reached, or does not have the file."""


@contextmanager
def arriving(target: Path, check: Check, replace: bool = False) -> Iterator[Path | None]:
    """Gives the path to write a new file to, which then is checked and named ``target`` in one step.

    One process at a time; the others wait. Gives None if the file is there by then, unless it is to be replaced: then
    that gets another name. What was written remains if writing it was cut off, for the next try to go on with, and is
    removed if the check refuses it.
    """
    part = target.with_name(f"{target.name}.part")
    with _alone(target, part):
        if target.is_file() and not replace:
            yield None
            return
        yield part
        try:
            check(part)
        except UserError:
            part.unlink()
            raise
        if target.is_file():
            set_aside(target)
        part.replace(target)


def set_aside(path: Path) -> None:
    """Give a file another name, so that one that comes in its place costs nobody anything.

    Raises:
        UserError: if that is not allowed.
    """
    names = (path.with_name(f"{path.name}.old{number or ''}") for number in itertools.count())
    kept = next(name for name in names if not name.exists())
    try:
        path.rename(kept)
    except OSError as error:
        raise UserError(f"cannot rename {path}, which is in the way: {error.strerror}") from error
    _logger.info(f"{path} is now called {kept.name}")


def copy(source: Path, part: Path) -> None:
    """Copy a file to ``part``, or leave nothing there: a copy that was cut off is of no use.

    Raises:
        UserError: if it cannot be read or written.
    """
    try:
        shutil.copyfile(source, part)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot copy {source} to {part.parent}: {error.strerror or error}") from error


@contextmanager
def _alone(target: Path, part: Path) -> Iterator[None]:
    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _logger.info(f"another process is getting {target.name}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if not part.exists():  # nothing is left to protect; those who wait have the lock's file open
            Path(f"{target}.lock").unlink(missing_ok=True)
        lock.release()


def receive(url: str, part: Path) -> None:
    """Download ``url`` to ``part``, going on with what is there of the same file.

    A connection that breaks is taken up again as long as each brings something.

    Raises:
        Unavailable: if the server cannot be reached or has no such file.
        UserError: if what comes is no file, or the disk is full.
    """
    while True:
        before = _size(part)
        try:
            total = _receive_once(url, part)
        except urllib.error.HTTPError as error:
            raise Unavailable(f"{url} could not be downloaded: HTTP {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            if _size(part) > before:
                continue
            reason = getattr(error, "reason", None) or error
            raise Unavailable(f"{url} could not be reached: {' '.join(str(reason).split())}") from error
        if total is None or _size(part) == total:
            _validator_file(part).unlink(missing_ok=True)
            return
        if _size(part) <= before:
            raise Unavailable(
                f"{url} broke off after {_size(part):,} of {total:,} bytes, again and again; run again to go on"
            )


@dataclass(frozen=True)
class _Reply:
    """Where in the file the body starts, and the size of the whole, if the server says so."""

    start: int
    total: int | None


def _receive_once(url: str, part: Path) -> int | None:
    """One request; the size that the whole file has, if known. What arrives is kept even if the connection breaks."""
    have, validator = _size(part), _validator(part, url)
    request = urllib.request.Request(url, headers={"User-Agent": "vmamba", "Accept-Encoding": "identity"})
    if have and validator:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=_SILENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing is left to send, or the file there is another one by now.
        total = _total(error.headers)
        if total != have:
            part.unlink(missing_ok=True)
            return _receive_once(url, part)
        return total
    with response:
        if response.headers.get_content_type() == "text/html":
            raise Unavailable(f"{url} leads to a web page, not to a file")
        reply = _reply(response, have)
        with _disk(part):
            _require_space(part, reply)
            _remember_validator(part, url, response.headers)
        _append(response, part, reply)
        return reply.total


def _reply(response: Any, have: int) -> _Reply:
    length = response.headers.get("Content-Length")
    if response.status == 206:
        start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if start and int(start[1]) <= have:
            return _Reply(int(start[1]), _total(response.headers))
        raise Unavailable(f"{response.url} answers with another part of the file than was asked for")
    return _Reply(0, int(length) if length else None)


def _append(response: Any, part: Path, reply: _Reply) -> None:
    name = part.name.removesuffix(".part")
    bar = tqdm(
        total=reply.total, initial=reply.start, unit="B", unit_scale=True, unit_divisor=1024, desc=name, disable=None
    )
    with bar, _open(part, reply.start) as file:
        while chunk := response.read1(_CHUNK):
            with _disk(part):
                file.write(chunk)
            bar.update(len(chunk))


@contextmanager
def _open(part: Path, start: int) -> Iterator[BinaryIO]:
    """The file, cut off at ``start``, to go on writing there; on the disk when left."""
    with _disk(part):
        file = part.open("r+b" if part.exists() else "wb")
    with file:
        with _disk(part):
            file.truncate(start)
            file.seek(start)
        yield file
        with _disk(part):
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _disk(part: Path) -> Iterator[None]:
    """Tells what the disk refuses from what the network does."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {part}: {error.strerror or error}; run again to go on") from error


def _total(headers: Any) -> int | None:
    found = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _require_space(part: Path, reply: _Reply) -> None:
    if reply.total is None:
        return
    needed, free = reply.total - reply.start, shutil.disk_usage(part.parent).free
    if needed > free:
        raise UserError(f"{part.parent} has {free / 1e6:,.0f} MB left, but the file needs {needed / 1e6:,.0f} MB")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _validator(part: Path, url: str) -> str | None:
    """What the server called the version of the file that ``part`` is the beginning of."""
    try:
        content = json.loads(_validator_file(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("validator") if content.get("url") == url else None


def _remember_validator(part: Path, url: str, headers: Any) -> None:
    etag = headers.get("ETag")
    strong = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    _validator_file(part).write_text(json.dumps({"url": url, "validator": strong}), encoding="utf-8")

"""From the name of published weights to a file on this machine."""

import contextlib
import logging
from pathlib import Path

from vmamba.errors import UserError
from vmamba.weights import download, drive, places, record
from vmamba.weights.manifest import Checkpoint, find

_logger = logging.getLogger(__name__)


def fetch(name: str | Checkpoint, folder: Path | None = None, accept: bool = False) -> Path:
    """The file of a checkpoint: as it lies here, or downloaded; compared with what it was before.

    Looked for in the folder of ``VMAMBA_CHECKPOINTS`` or `checkpoints` of a checkout, in the cache and in that of the
    Hugging Face hub; then asked for at the mirror of ``VMAMBA_WEIGHTS_MIRROR``, if one is named, and at its source.

    Args:
        name: A name of the manifest, or what it stands for.
        folder: Where to look first and to download to; default: that of ``VMAMBA_CHECKPOINTS``, or the cache. What is
            on the Hugging Face hub stays in that hub's cache.
        accept: Take a file that is not what was published or seen before.

    Returns:
        The published file, or a converted one (``.safetensors``).

    Raises:
        UserError: if there are no such weights, if they cannot be had, or if the file is not what it should be.
    """
    checkpoint = find(name) if isinstance(name, str) else name
    path = places.local(checkpoint, folder)
    if path is not None:
        record.check(checkpoint, path, str(path), accept=accept)
        return path
    path = _from_mirror(checkpoint, folder or places.destination(), accept)
    return path or _from_source(checkpoint, folder, accept)


def fetch_into(folder: Path, name: str | Checkpoint, accept: bool = False) -> Path:
    """Like :func:`fetch`, but leaves a copy of the file in ``folder`` if it was found elsewhere."""
    checkpoint = find(name) if isinstance(name, str) else name
    path = fetch(checkpoint, folder, accept)
    target = folder / (checkpoint.name + path.suffix)
    with _arriving(checkpoint, str(path), target, accept) as part:
        if part is not None:
            download.copy(path, part)
    return target


def _from_mirror(checkpoint: Checkpoint, folder: Path, accept: bool) -> Path | None:
    """The file from the mirror, published or converted; None if there is no mirror, or it does not have it."""
    mirror = places.mirror()
    if mirror is None:
        return None
    reasons = []
    for name in (checkpoint.file_name, checkpoint.name + places.CONVERTED_SUFFIX):
        try:
            return _download(checkpoint, f"{mirror}/{name}", folder / name, accept)
        except download.Unavailable as error:
            reasons.append(error)
    _logger.warning(f"not at the mirror: {reasons[0]}; trying {checkpoint.page}")
    return None


def _from_source(checkpoint: Checkpoint, folder: Path | None, accept: bool) -> Path:
    if checkpoint.host == "hub":
        return _from_hub(checkpoint, accept)
    target = (folder or places.destination()) / checkpoint.file_name
    try:
        if checkpoint.host == "web":
            return _download(checkpoint, checkpoint.url, target, accept)
        with _arriving(checkpoint, checkpoint.url, target, accept) as part:
            if part is not None:
                drive.receive(checkpoint, part)
        return target
    except download.Unavailable as error:
        raise UserError(f"cannot get {checkpoint.name}: {error}{_without_network(checkpoint)}") from error


def _download(checkpoint: Checkpoint, url: str, target: Path, accept: bool) -> Path:
    with _arriving(checkpoint, url, target, accept) as part:
        if part is not None:
            download.receive(url, part)
    return target


def _arriving(
    checkpoint: Checkpoint, source: str, target: Path, accept: bool
) -> contextlib.AbstractContextManager[Path | None]:
    """Gives the path to write to, if the file is still to be got; it is compared before it takes its name."""
    return download.arriving(target, lambda part: record.check(checkpoint, part, source, target, accept))


def _from_hub(checkpoint: Checkpoint, accept: bool) -> Path:
    """The file in the hub's own cache, where its library downloads it to."""
    from huggingface_hub import hf_hub_download

    assert checkpoint.hub and checkpoint.file
    try:
        path = Path(hf_hub_download(checkpoint.hub, checkpoint.file))
    except Exception as error:  # of the library that the hub's one happens to use for HTTP
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot get {checkpoint.name} from {checkpoint.page}: {reason}") from error
    record.check(checkpoint, path, checkpoint.url, accept=accept)
    return path


def _without_network(checkpoint: Checkpoint) -> str:
    if checkpoint.host == "drive":
        return ""
    return (
        f"; without a network, put the file into {places.destination()} as {checkpoint.file_name}, or name a mirror in "
        f"{places.MIRROR_VARIABLE}"
    )

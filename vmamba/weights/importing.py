"""Files that a user got by other means, taken in under a name of the manifest."""

from pathlib import Path

from vmamba.errors import UserError
from vmamba.weights import download, places, record
from vmamba.weights.contents import own_weights
from vmamba.weights.convert import is_made_of
from vmamba.weights.manifest import Checkpoint

_REMEDY = "--accept renames it and takes in this one"


def take_in(checkpoint: Checkpoint, file: Path, folder: Path, accept: bool = False) -> Path:
    """Copy a file to where it is found by its name, once it has been read and compared with the model.

    Args:
        checkpoint: What the file is said to be.
        file: The published file, or a converted one, under any name.
        folder: Where to put the copy.
        accept: Take it even if it is not what was published or seen before. Other files that are there, under its name
            or where they would be found in its place, get names of their own.

    Returns:
        The copy.

    Raises:
        UserError: if it is something else, or if others are there and are not to be moved.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    own_weights(checkpoint, file)
    is_converted = file.suffix == places.CONVERTED_SUFFIX
    target = folder / (checkpoint.name + places.CONVERTED_SUFFIX if is_converted else checkpoint.file_name)
    before = places.found_before(checkpoint, target)
    if not before and not target.is_file():
        _copy(checkpoint, file, target, accept)
        return target
    digest = record.sha256(file)
    hiding = [path for path in before if not _is_same(path, digest)]
    if hiding and not accept:
        raise UserError(f"{hiding[0]} is there already and would be found before {target.name}; {_REMEDY}")
    if target.is_file() and record.sha256(target) == digest:
        record.check(checkpoint, target, str(file), accept=accept)
    else:
        _copy(checkpoint, file, target, accept)
    for path in hiding:
        download.set_aside(path)
    return target


def _is_same(path: Path, digest: str) -> bool:
    return is_made_of(path, digest) or record.sha256(path) == digest


def _copy(checkpoint: Checkpoint, file: Path, target: Path, accept: bool) -> None:
    if target.is_file() and not accept:
        raise UserError(f"{target} is there already, and is another file; {_REMEDY}")
    with download.arriving(
        target, lambda part: record.check(checkpoint, part, str(file), target, accept), replace=accept
    ) as part:
        if part is not None:
            download.copy(file, part)

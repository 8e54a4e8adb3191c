"""Files that a user got by other means, taken in under a name of the manifest."""

import shutil
from pathlib import Path

from vmamba.errors import UserError
from vmamba.weights import download, places, record
from vmamba.weights.contents import own_weights
from vmamba.weights.manifest import Checkpoint


def take_in(checkpoint: Checkpoint, file: Path, folder: Path, accept: bool = False) -> Path:
    """Copy a file to where it is found by its name, once it has been read and compared with the model.

    Args:
        checkpoint: What the file is said to be.
        file: The published file, or a converted one, under any name.
        folder: Where to put the copy.
        accept: Take it even if it is not what was published or seen before, and replace what is there.

    Returns:
        The copy.

    Raises:
        UserError: if it is something else.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    own_weights(checkpoint, file)
    is_converted = file.suffix == places.CONVERTED_SUFFIX
    target = folder / (checkpoint.name + places.CONVERTED_SUFFIX if is_converted else checkpoint.file_name)
    if target.is_file():
        if target.samefile(file) or record.sha256(target) == record.sha256(file):
            record.check(checkpoint, target, str(file), accept=accept)
            return target
        if not accept:
            raise UserError(f"{target} is there already, and is another file; replace it with --accept")
    with download.arriving(
        target, lambda part: record.check(checkpoint, part, str(file), target, accept), replace=accept
    ) as part:
        if part is not None:
            shutil.copyfile(file, part)
    return target

"""Files on Google Drive, by gdown, which is optional."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vmamba.errors import UserError
from vmamba.weights.download import Unavailable
from vmamba.weights.manifest import Checkpoint

_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def receive(checkpoint: Checkpoint, part: Path) -> None:
    """Download a checkpoint to ``part``; from a folder, the one file that can hold weights.

    What is there already is not gone on with: gdown takes it for the whole file.

    Raises:
        UserError: without gdown, or if it cannot be told which file it is: what to do by hand.
        Unavailable: if Google Drive does not give it.
    """
    try:
        import gdown
    except ImportError:
        raise UserError(
            f"{checkpoint.name} is on Google Drive, which needs gdown (pip install gdown); or {by_hand(checkpoint)}"
        ) from None
    try:
        url = checkpoint.url
        if checkpoint.is_folder:
            files = gdown.download_folder(url, skip_download=True, quiet=True)
            url = f"https://drive.google.com/uc?id={_only_weights(checkpoint, files).id}"
        part.unlink(missing_ok=True)
        get(gdown, url, part)
        if not part.is_file():  # old versions return instead of raising
            raise FileNotFoundError(f"nothing came from {url}")
    except UserError:
        raise
    except Exception as error:  # of gdown, requests and its parser: their types are no part of an interface
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(
            f"Google Drive did not give {checkpoint.name}: {reason}; instead, {by_hand(checkpoint)}"
        ) from error


def get(gdown: Any, url: str, part: Path) -> None:
    """Let gdown download a file, going on with what it has of it under a name of its own."""
    gdown.download(url, str(part), resume=True, use_cookies=False)


def by_hand(checkpoint: Checkpoint) -> str:
    """What to do in a browser."""
    what = "download its checkpoint" if checkpoint.is_folder else "download the file"
    return f"open {checkpoint.url}, {what}, and run: vmamba weights import FILE --as {checkpoint.name}"


def _only_weights(checkpoint: Checkpoint, files: Sequence[Any]) -> Any:
    candidates = [file for file in files if PurePosixPath(file.path).suffix in _SUFFIXES]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(file.path for file in candidates or files) or "nothing"
    raise UserError(f"the folder of {checkpoint.name} holds {found}: which it is cannot be told; {by_hand(checkpoint)}")

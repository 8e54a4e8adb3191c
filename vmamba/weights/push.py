"""Converted weights to a repository of one's own on the Hugging Face hub, with a card that says whose they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from timm.models import save_for_hf

from vmamba.errors import UserError
from vmamba.weights import places
from vmamba.weights.convert import convert
from vmamba.weights.manifest import NONE_STATED, Checkpoint
from vmamba.weights.table import figures

WEIGHTS_NAME = "model.safetensors"

_PIPELINES = {
    "classification": "image-classification",
    "detection": "object-detection",
    "segmentation": "image-segmentation",
}


@contextmanager
def prepared(checkpoint: Checkpoint, path: Path, repository: str) -> Iterator[Path]:
    """A folder with what is uploaded, for as long as it is needed.

    It holds the weights, the card and, for a classifier, the configuration by which
    ``timm.create_model("hf-hub:OWNER/NAME", pretrained=True)`` builds its model.

    Args:
        checkpoint: What is uploaded.
        path: Its file, published or converted.
        repository: ``OWNER/NAME`` on the hub.
    """
    with TemporaryDirectory(prefix="vmamba-push-") as name:
        folder = Path(name)
        if path.suffix == places.CONVERTED_SUFFIX:
            converted = path
        else:
            converted = convert(checkpoint, path, places.destination())
        if checkpoint.task == "classification":
            model = timm.create_model(checkpoint.name, pretrained=True, pretrained_cfg_overlay={"file": str(converted)})
            save_for_hf(model, str(folder), safe_serialization=True)
        # With what they are beside them, which timm's own does not store.
        (folder / WEIGHTS_NAME).unlink(missing_ok=True)
        (folder / WEIGHTS_NAME).symlink_to(converted.absolute())
        (folder / "README.md").write_text(card(checkpoint, repository), encoding="utf-8")
        yield folder


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Create the repository if need be, and upload a folder to it.

    Returns:
        The address of the commit.

    Raises:
        UserError: if the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="vmamba")
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add weights")
    except Exception as error:  # of the library that the hub's one happens to use for HTTP
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"could not push to {repository}: {reason}; hf auth login tells the hub who you are") from error
    return str(commit.commit_url)


def card(checkpoint: Checkpoint, repository: str) -> str:
    """The model card, as Markdown with the hub's header."""
    stated = checkpoint.license != NONE_STATED
    header = [
        "---",
        f"license: {checkpoint.license}" if stated else "license: other",
        *([] if stated else ["license_name: none-stated"]),
        f"library_name: {'timm' if checkpoint.task == 'classification' else 'vmamba'}",
        f"pipeline_tag: {_PIPELINES[checkpoint.task]}",
        "tags: [vmamba, mamba, state-space-model]",
        "---",
    ]
    licence = "none was stated by the authors" if not stated else checkpoint.license
    facts = {
        "Paper": f"[{checkpoint.title}](https://arxiv.org/abs/{checkpoint.paper})",
        "Published at": f"<{checkpoint.url}>, by the authors of <{checkpoint.repository}>",
        "Licence": licence + (f" ({checkpoint.license_note})" if checkpoint.license_note else ""),
        "Figures of the authors": figures(checkpoint),
    }
    lines = [
        *header,
        f"# {checkpoint.name}",
        "",
        f"Weights of `{checkpoint.name}`, converted by the Python package `vmamba` from the file that its authors "
        "published: the same numbers, as safetensors.",
        "",
        *(f"- **{key}:** {value}" for key, value in facts.items()),
        *([f"- **Note:** {checkpoint.note}"] if checkpoint.note else []),
        "",
        *_usage(checkpoint, repository),
        "",
    ]
    return "\n".join(lines)


def _usage(checkpoint: Checkpoint, repository: str) -> list[str]:
    if checkpoint.task == "classification":
        code = ["import timm, vmamba", f'model = timm.create_model("hf-hub:{repository}", pretrained=True)']
        return ["```python", *code, "```"]
    return [
        f"For the configuration `{checkpoint.config}` of vmamba, under the names of "
        f"{'mmdet' if checkpoint.task == 'detection' else 'mmseg'}:",
        "",
        "```bash",
        f"hf download {repository} {WEIGHTS_NAME} --local-dir .",
        f"vmamba weights import {WEIGHTS_NAME} --as {checkpoint.name}",
        "```",
    ]

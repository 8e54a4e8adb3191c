"""What the demonstrations need and make by themselves: scenes of digits, and a classifier of digits to start from."""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from mmengine.config import Config

from vmamba.data.scenes import SceneRecipe, make_scenes
from vmamba.errors import UserError

_OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def prepare_scenes(settings: Config) -> None:
    """Make the data of a configuration with an entry ``digit_scenes``, a :class:`SceneRecipe`, where there is none."""
    recipe = settings.get("digit_scenes")
    if recipe is None:
        return
    folder = Path(settings.data_root)
    if folder.exists() and any(folder.iterdir()):
        return  # what is there is looked at before it is used
    if make_scenes(folder, SceneRecipe(**recipe)) and _is_first():
        print(f"made {folder}: scenes of handwritten digits, since there was no data yet (vmamba scenes)", flush=True)


def prepare_classifier(settings: Config, *options: str) -> None:
    """Train the weights that an entry ``digits_classifier`` names, where they are missing: what `vmamba train` does.

    Of several processes the first trains, and the others wait.

    Args:
        settings: The configuration.
        *options: For `vmamba train`, to train otherwise than by default.

    Raises:
        UserError: It could not be trained.
    """
    name = settings.get("digits_classifier")
    if name is None or Path(name).exists():
        return
    if _is_first():
        _train(Path(name), options)
    while not Path(name).exists():
        time.sleep(1)


def _train(file: Path, options: tuple[str, ...]) -> None:
    run = file.parent
    print(f"no {file} yet: training a classifier of digits to start from, as vmamba train does", flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    # The file takes its name only when training has ended: others wait for it.
    with TemporaryDirectory(prefix=f".{run.name}-", dir=run.parent) as folder:
        command = [sys.executable, "-m", "vmamba.cli.main", "train", "--output", folder, "--name", run.name]
        command += options
        alone = {key: value for key, value in os.environ.items() if key not in _OF_A_GROUP}
        status = subprocess.run(command, env=alone, check=False).returncode
        if status:
            raise UserError(f"the classifier of digits could not be trained (exit status {status}): run vmamba train")
        try:
            Path(folder, run.name).replace(run)
        except OSError as error:
            raise UserError(f"cannot write {run}, where a classifier of digits goes: {error.strerror}") from error


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"

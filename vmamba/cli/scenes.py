"""`vmamba scenes`."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path

from vmamba.data.scenes import SceneRecipe, make_scenes

_HELP = {
    "train": "scenes for training",
    "val": "scenes for validation",
    "size": "their width and height in pixels",
    "seed": "of everything random",
}


def add_arguments(parser: ArgumentParser) -> None:
    """The folder, and a recipe."""
    parser.add_argument("folder", metavar="FOLDER", help="where to write; nothing that is there is overwritten")
    for option in fields(SceneRecipe):
        parser.add_argument(
            f"--{option.name}",
            type=int,
            default=option.default,
            metavar="N",
            help=f"{_HELP[option.name]} (default: {option.default})",
        )


def run(args: Namespace) -> None:
    """Make the scenes, and say where they are."""
    recipe = SceneRecipe(**{option.name: getattr(args, option.name) for option in fields(SceneRecipe)})
    made = make_scenes(Path(args.folder), recipe)
    what = f"{recipe.train} scenes for training and {recipe.val} for validation, COCO's and ADE20K's layout"
    print(f"{'wrote' if made else 'was there already:'} {args.folder}: {what}")

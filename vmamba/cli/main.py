"""The `vmamba` command: finds the sub-command, and turns mistakes into one line."""

import importlib
import os
import sys
from argparse import Action, ArgumentError, ArgumentParser
from collections.abc import Sequence
from typing import Any, NoReturn

from vmamba import __version__
from vmamba.errors import UserError, nearest

# Each sub-command is a module with `add_arguments(parser)` and `run(args)`. It is imported only when it is called, so
# that the help comes at once.
COMMANDS = {
    "train": ("vmamba.cli.train", "train a classifier; alone, a small one on handwritten digits"),
    "validate": ("vmamba.cli.validate", "measure accuracy on labelled images"),
    "predict": ("vmamba.cli.predict", "name what is on images"),
    "train-dense": ("vmamba.mm.train", "train a detector or segmentor (needs the mm extra)"),
    "test-dense": ("vmamba.mm.test", "measure a detector's AP or a segmentor's IoU"),
    "predict-dense": ("vmamba.mm.predict", "draw what a detector or segmentor finds on images"),
    "flops-dense": ("vmamba.mm.flops", "count the operations of a whole detector or segmentor"),
    "scenes": ("vmamba.cli.scenes", "make detection and segmentation data: digits in scenes"),
    "show": ("vmamba.cli.show", "draw a model's routes, receptive field, attention and features"),
    "benchmark": ("vmamba.cli.benchmark", "measure speed and memory of models beside timm's"),
    "weights": ("vmamba.cli.weights", "list, download, verify, convert, import or push published weights"),
    "flops": ("vmamba.cli.flops", "count what a model costs: parameters, MACs, FLOPs, by module"),
    "models": ("vmamba.cli.models", "list the models: parameters, MACs, top-1, licence"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        Exit status: 0, 2 for a mistake in the input, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        rank = os.environ.get("RANK")
        where = f" [process {rank}]" if rank not in (None, "0") else ""
        print(f"vmamba: error{where}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vmamba: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, has seen enough; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"vmamba {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'{nearest(name, COMMANDS) or '; see vmamba --help'}")
    module_name, summary = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        extra = "vmamba[mm]" if module_name.startswith("vmamba.mm.") else "vmamba"
        raise UserError(
            f"vmamba {name} needs '{error.name}', which is not installed; it comes with: pip install '{extra}'"
        ) from error
    parser = _Parser(f"vmamba {name}", description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False)
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments[1:]))
    return 0


class _Parser(ArgumentParser):
    """Reports mistakes in one line, without the usage before it, and names what is near.

    Parsers of sub-commands are of this class too, and answer for their own options.
    """

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        parsed, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = nearest(unknown[0].partition("=")[0], options)
            raise UserError(f"{self.prog} does not know '{unknown[0]}'{near}")
        return parsed, unknown

    def _check_value(self, action: Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except ArgumentError as error:
            near = nearest(str(value), map(str, action.choices or ()))
            raise ArgumentError(action, f"{error.message}{near}") from None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def _help() -> str:
    lines = ["usage: vmamba COMMAND [OPTIONS]", "", "Vision-Mamba backbones.", "", "commands:"]
    lines += [f"  {name:<13} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "`vmamba COMMAND --help` lists the options of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""`vmamba weights`."""

import fnmatch
import logging
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from vmamba.errors import UserError, nearest

_logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """The actions, each with its options."""
    parser.epilog = "names are those of `vmamba weights list`; `vmamba weights ACTION --help` lists an action's options"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    action = actions.add_parser("list", help="what there is, and where", allow_abbrev=False)
    action.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern such as '*_upernet_*'")
    action.add_argument("--task", choices=["classification", "detection", "segmentation"])
    action.add_argument("--markdown", action="store_true", help="the whole table with all links, as Markdown")
    action.set_defaults(act=_list)

    action = actions.add_parser("download", help="get files, checked before they take their names", allow_abbrev=False)
    action.add_argument("names", nargs="+", metavar="NAME")
    _add_destination(action)
    _add_accept(action)
    action.set_defaults(act=_download)

    action = actions.add_parser("verify", help="read what is here again: has a file changed?", allow_abbrev=False)
    action.add_argument("names", nargs="*", metavar="NAME", help="(default: all that are here)")
    _add_accept(action)
    action.set_defaults(act=_verify)

    action = actions.add_parser("convert", help="to safetensors, with origin and licence inside", allow_abbrev=False)
    action.add_argument("names", nargs="+", metavar="NAME")
    _add_destination(action)
    action.set_defaults(act=_convert)

    action = actions.add_parser("import", help="take in a file that you got by other means", allow_abbrev=False)
    action.add_argument("file", type=Path, metavar="FILE")
    action.add_argument("--as", dest="name", required=True, metavar="NAME", help="what it is")
    _add_destination(action)
    _add_accept(action)
    action.set_defaults(act=_import)

    action = actions.add_parser("push", help="upload converted weights to the Hugging Face hub", allow_abbrev=False)
    action.add_argument("name", metavar="NAME")
    action.add_argument(
        "--to", required=True, dest="repository", metavar="OWNER/NAME", type=_repository, help="yours on the hub"
    )
    action.add_argument("--private", action="store_true", help="if the repository is created, make it private")
    action.add_argument("--upload", action="store_true", help="do it; without, only say what would be done")
    action.set_defaults(act=_push)


def run(args: Namespace) -> None:
    """Do what the action says."""
    from vmamba.cli.output import on_terminal

    with on_terminal():
        args.act(args)


def _add_destination(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="folder to write to (default: that in VMAMBA_CHECKPOINTS, or the cache)"
    )


def _add_accept(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--accept", action="store_true", help="take whole files that are not what was published or seen before"
    )


def _repository(text: str) -> str:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
        if "/" not in text:  # such as those that the hub itself has
            raise HFValidationError
    except HFValidationError:
        raise ArgumentTypeError(f"'{text}' is no name of a repository such as OWNER/NAME") from None
    return text


def _list(args: Namespace) -> None:
    from vmamba.weights import checkpoints, table

    if args.markdown:
        print(table.readme(), end="")
        return
    pattern = args.pattern if any(sign in args.pattern for sign in "*?[") else f"*{args.pattern}*"
    found = [item for name, item in checkpoints().items() if fnmatch.fnmatch(name, pattern)]
    if not found:
        raise UserError(f"no weights match '{args.pattern}'{nearest(args.pattern, checkpoints())}")
    rows = table.rows(item for item in found if args.task in (None, item.task))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _download(args: Namespace) -> None:
    from vmamba.weights import fetch, fetch_into, find, places

    folder = args.to or places.named_folder()
    for checkpoint in [find(name) for name in args.names]:
        path = fetch_into(folder, checkpoint, args.accept) if folder else fetch(checkpoint, accept=args.accept)
        _logger.info(f"{checkpoint.name}: {path}")


def _verify(args: Namespace) -> None:
    from vmamba.weights import checkpoints, find, places, record

    found = []
    for checkpoint in [find(name) for name in args.names] or checkpoints().values():
        paths = places.all_local(checkpoint)
        if args.names and not paths:
            raise UserError(f"{checkpoint.name} is not here; get it: vmamba weights download {checkpoint.name}")
        found += [(checkpoint, path) for path in paths]
    wrong = 0
    for checkpoint, path in found:
        try:
            digest = record.check(checkpoint, path, str(path), accept=args.accept, anew=True)
            _logger.info(f"{checkpoint.name}: {digest}  {path}")
        except record.RecordError:
            raise
        except UserError as error:
            wrong += 1
            _logger.error(str(error))
    if wrong:
        raise UserError(f"{wrong} of {len(found)} files are not what they were or should be")
    if not found:
        _logger.info("no weights are here yet")


def _convert(args: Namespace) -> None:
    from vmamba.weights import fetch, find, places
    from vmamba.weights.convert import convert

    for checkpoint in [find(name) for name in args.names]:
        _logger.info(f"{checkpoint.name}: {convert(checkpoint, fetch(checkpoint), args.to or places.destination())}")


def _import(args: Namespace) -> None:
    from vmamba.weights import find, places
    from vmamba.weights.importing import take_in

    checkpoint = find(args.name)
    path = take_in(checkpoint, args.file, args.to or places.destination(), args.accept)
    _logger.info(f"{checkpoint.name}: {path}")


def _push(args: Namespace) -> None:
    from vmamba.weights import fetch, find, push

    checkpoint = find(args.name)
    with push.prepared(checkpoint, fetch(checkpoint), args.repository) as folder:
        _logger.info(f"to https://huggingface.co/{args.repository}:")
        for path in sorted(folder.iterdir()):
            _logger.info(f"  {path.name}  {path.stat().st_size / 1e6:,.2f} MB")
        _logger.info("\n" + (folder / "README.md").read_text(encoding="utf-8"))
        if args.upload:
            _logger.info(f"uploaded: {push.upload(folder, args.repository, args.private)}")
        else:
            _logger.info("nothing was uploaded; add --upload to do it")

"""Pages that mkdocs makes when it builds the documentation, out of what stands elsewhere in the repository.

`model_zoo.md` comes from :mod:`model_zoo`, and the READMEs of `benchmarks/` and `results/` become pages. They are made,
not committed: a copy could fall behind.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from model_zoo import model_zoo

from vmamba.weights import checkpoints

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

LINKING = ("README.md", "CHANGELOG.md", "checkpoints/README.md")
"""Files that become no pages but whose links have to lead somewhere too."""

READMES = {"benchmarks/README.md": "gpu.md", "results/README.md": "results.md"}
"""READMEs of the repository, and the pages they become."""

PAGES = {**READMES, "checkpoints/README.md": "model_zoo.md"}
"""Files that pages link to, so that the links lead somewhere in the repository too, and the pages to show instead."""

_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)")
_ANCHOR = re.compile(r'<h\d id="(vmamba[^"]*)"')
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>([^<]+)</code>")


def on_pre_build(config: MkDocsConfig) -> None:
    """Called by mkdocs before anything else."""
    for name in LINKING:
        check_links((ROOT / name).read_text(encoding="utf-8"), ROOT / name)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files in docs/."""
    files.append(File.generated(config, "model_zoo.md", content=model_zoo(checkpoints().values())))
    for source, page in READMES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=turn_links(content, ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Called by mkdocs with each page."""
    source = page.file.abs_src_path
    return turn_links(markdown, Path(source)) if source else markdown


def on_page_content(html: str, **_: object) -> str:
    """Called by mkdocs with each page's HTML: docstrings' roles, ``:func:`name```, become links where they can."""
    anchors = [(match.start(), match[1]) for match in _ANCHOR.finditer(html)]

    def link(match: re.Match[str]) -> str:
        name = match[1].lstrip("~.")
        last = name.rpartition(".")[2]
        code = f"<code>{name}</code>"
        # Several classes may have a method of that name; the nearest is meant.
        found = [(abs(at - match.start()), anchor) for at, anchor in anchors if anchor.rpartition(".")[2] == last]
        return f'<a href="#{min(found)[1]}">{code}</a>' if found else code

    return _ROLE.sub(link, html)


def turn_links(markdown: str, source: Path) -> str:
    """Relative links, which are right in the repository, turned to where their targets are in the documentation.

    What is no page becomes the path of the file in the repository.

    Args:
        markdown: The text.
        source: The file it is from.

    Raises:
        PluginError: for a link to a file that is not in the repository, even if it is a page that is made.
    """

    def turn(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = (source.parent / target).resolve()
        _require(path, target, source)
        if DOCS in path.parents:
            return f"[{text}]({os.path.relpath(path, DOCS)}{anchor or ''})" if DOCS not in source.parents else match[0]
        inside = path.relative_to(ROOT).as_posix()
        if inside in PAGES:
            return f"[{text}]({PAGES[inside]}{anchor or ''})"
        return f"`{inside}`" if text.strip("`") == inside else f"{text} (`{inside}`)"

    return _LINK.sub(turn, markdown)


def check_links(markdown: str, source: Path) -> None:
    """Raises PluginError for a relative link to a file that is not there."""
    for match in _LINK.finditer(markdown):
        _require(source.parent / match[2], match[2], source)


def _require(path: Path, target: str, source: Path) -> None:
    if not path.exists():
        raise PluginError(f"{source.relative_to(ROOT)} links to {target}, which does not exist")

"""
The documentation site: `make docs-site` builds it into `build/site`, `make check` as well, with every warning an error.

The source folder is the repository itself, so a relative link (`../deploy/README.md`, `../examples/requests.jsonl`)
means the same here as on a forge.  Pages are plain Markdown; what they link to and is no page becomes a download.
The navigation is read from the headings and lists of `docs/README.md`, which is what a forge shows for the folder.
"""

import posixpath
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

START = "docs/README"
LISTS = {START, "docs/decisions/README"}
"""Pages whose lists of links are the navigation."""

project = "Pub/Sub batch inference worker"
copyright = "the authors; licence: Apache-2.0"  # noqa: A001 - Sphinx's own name for it
root_doc = START
extensions = ["myst_parser"]
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "deploy/README.md",
    "examples/**.md",
    "docs/**.md",
]
myst_enable_extensions = ["tasklist"]
myst_heading_anchors = 6
"""Every heading has the anchor that a forge gives it."""
nitpicky = True
smartquotes = False
"""They turn the two hyphens of an option into a dash."""
html_theme = "furo"
html_title = "Inference worker"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "default"
pygments_dark_style = "github-dark"


def navigation(page: str, folder: str) -> str:
    """
    Return the trees of the side bar: one for each heading `## …` of a page, with the Markdown pages that it lists.

    Args:
        page: The text of a page that lists others; what stands before its first heading counts as well, untitled.
        folder: Where the page is, from the root of the repository.
    """
    trees = []
    for section in page.split("\n## "):
        title = "" if section.startswith("# ") else section.partition("\n")[0]
        named = re.findall(r"^\* \[([^\]]+)\]\(([^)#:]+)\.md\)", section, re.MULTILINE)
        if named:
            pages = [f"{text} </{posixpath.normpath(posixpath.join(folder, name))}>" for text, name in named]
            caption = [f":caption: {title}"] if title else []
            trees.append("\n".join(["```{toctree}", ":hidden:", *caption, "", *pages, "```"]))
    return "\n\n".join(trees)


def _add_navigation(_: Sphinx, name: str, source: list[str]) -> None:
    if name in LISTS:
        source[0] += "\n\n" + navigation(source[0], posixpath.dirname(name))


def _write_entrance(app: Sphinx, failure: Exception | None) -> None:
    if failure is None and app.builder.format == "html":
        page = f'<!doctype html><title>{html_title}</title><meta http-equiv="refresh" content="0; url={START}.html">\n'
        Path(app.outdir, "index.html").write_text(page, "utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the two functions above."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _write_entrance)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

"""The documentation site: what it refuses, that it needs no network, and that its anchors are those of a forge."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md"), *ROOT.glob("examples/**/*.md")]
)

pytestmark = pytest.mark.slow


def build(folder: Path, **pages: str) -> subprocess.CompletedProcess[str]:
    """Build a small site by the project's own configuration, with warnings as errors; pages are named `a` for docs/a.md."""
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", folder / "docs")
    shutil.copytree(ROOT / "docs" / "_static", folder / "docs" / "_static")
    (folder / "file.txt").write_text("text")
    listed = "".join(f"* [{name}]({name}.md)\n" for name in pages if name != "hidden")
    (folder / "docs" / "README.md").write_text(f"# Start\n\n## Reference\n\n{listed}")
    for name, text in pages.items():
        (folder / "docs" / f"{name}.md").write_text(text)
    options = ["--quiet", "--fail-on-warning", "--keep-going", "-c", "docs", "-b", "html", ".", "site"]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options], cwd=folder, capture_output=True, text=True, check=False
    )


GOOD = "# A\n\n[b](b.md#two-words), [a file](../file.txt), [start](README.md#reference)\n"
B = "# B\n\n## Two `words`\n"


def test_a_site_is_built_that_needs_no_network(tmp_path: Path) -> None:
    """Links to pages, anchors and files work; no page loads a script, style, font or picture from elsewhere."""
    done = build(tmp_path, a=GOOD, b=B)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "docs" / "a.html").read_text("utf-8")
    assert 'href="b.html#two-words"' in page
    assert re.search(r'href="\.\./_downloads/\w+/file\.txt"', page)
    assert '<span class="caption-text">Reference</span>' in page
    assert "docs/README.html" in (tmp_path / "site" / "index.html").read_text("utf-8")
    loaded = re.findall(r'<(?:script|img|source|iframe)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"', page)
    assert loaded
    styles = "".join(path.read_text("utf-8") for path in (tmp_path / "site" / "_static").rglob("*.css"))
    addresses = ["".join(pair) for pair in loaded] + re.findall(r"(?:@import|url\()\s*[\"']?([^\"')]+)", styles)
    assert [address for address in addresses if re.match(r"(https?:)?//", address)] == []


def test_anchors_are_those_of_a_forge(tmp_path: Path) -> None:
    """Small letters, hyphens for spaces, no punctuation, a number for a repeated heading: a link works on both."""
    headings = {
        "`backend.base_url`": "backendbase_url",
        "What's *new*, and why?": "whats-new-and-why",
        "1. Install": "1-install",
        "Twice": "twice",
        "Twice ": "twice-1",
        "Große Körper": "große-körper",
        "a -- b": "a----b",
    }
    page = "# A\n\n" + "".join(f"## {heading}\n\ntext\n\n" for heading in headings)
    links = "".join(f"[x](a.md#{anchor})\n" for anchor in headings.values())
    done = build(tmp_path, a=page, b=f"# B\n\n{links}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("# A\n\n[b](c.md)\n", "c.md"),
        ("# A\n\n[b](b.md#three)\n", "three"),
        ("# A\n\n[here](#nowhere)\n", "nowhere"),
        ("# A\n\n[a file](../none.txt)\n", "none.txt"),
        ("# A\n\n[a folder](../docs)\n", "docs"),
    ],
)
def test_a_broken_link_fails(tmp_path: Path, page: str, fault: str) -> None:
    """A page, anchor, file or folder that a link cannot reach ends the build with an error that names it."""
    done = build(tmp_path, a=page, b=B)
    assert done.returncode != 0
    assert fault in done.stderr


def test_a_page_that_no_list_names_fails(tmp_path: Path) -> None:
    """A new page must be put into docs/README.md, or readers cannot find it."""
    done = build(tmp_path, a=GOOD, b=B, hidden="# Hidden\n")
    assert done.returncode != 0
    assert "hidden.md" in done.stderr
    assert "toctree" in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_a_page_is_plain_markdown(page: Path) -> None:
    """A forge shows it as the site does: no directive or role of the site's generator, no HTML but comments."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page.read_text("utf-8"))
    for token in tokens:
        assert not (token.type == "fence" and token.info.startswith("{")), token.info
        if token.type == "html_block":
            assert token.content.startswith("<!--"), token.content
        for inner in token.children or ():
            if inner.type == "text":
                assert not re.search(r"\{[a-z:]+\}$", inner.content), inner.content

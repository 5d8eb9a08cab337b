"""Settings of Sphinx. `make docs` builds the site; every warning is an error."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate_reference
from project_address import PROJECT_ADDRESS

import hf_divguard

project = "hf_divguard"
author = "The hf_divguard authors"
project_copyright = author
version = release = hf_divguard.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
# A heading that repeats a word of another page is found by its page.
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"

html_theme = "furo"
html_title = f"hf_divguard {release}"
html_static_path: list[str] = []
html_theme_options = {
    "source_repository": PROJECT_ADDRESS,
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_exclude = ".linenos, .gp, .go"


def link_to_repository(page: Path, text: str) -> str:
    """Return the text of a page, with links to files outside of ``docs`` as links to the repository."""

    def absolute(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = Path(os.path.normpath(page.parent / target))
        if path.is_relative_to(DOCS) or not path.exists():
            return match[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({PROJECT_ADDRESS}/{kind}/main/{path.relative_to(DOCS.parent).as_posix()}{anchor})"

    return re.sub(r"\]\((?!https?://)([^)#\s]+)(#[^)\s]*)?\)", absolute, text)


def toctree(pages: list[str], caption: str = "") -> str:
    """Return a hidden table of contents."""
    head = ":hidden:\n" + (f":caption: {caption}\n" if caption else "")
    return "\n```{toctree}\n" + head + "\n" + "\n".join(dict.fromkeys(pages)) + "\n```\n"


def contents(text: str) -> str:
    """Return the start page with a table of contents for each section whose table lists pages."""
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL):
        pages = re.findall(r"^\| \[[^]]*\]\(([\w/-]+)\.md\)", section, flags=re.MULTILINE)
        if title == "Reference":
            pages += [f"reference/{name}" for name in generate_reference.PAGES]
        if pages:
            text += toctree(pages, title)
    return text


def read_source(app: Any, name: str, source: list[str]) -> None:
    """Change a page before it is parsed; the files stay as they read well in the repository."""
    source[0] = link_to_repository(DOCS / f"{name}.md", source[0])
    if not source[0].startswith("# "):  # a table that a benchmark wrote
        source[0] = f"# {name.replace('/', ': ').capitalize()}\n\n{source[0]}"
    if name == "index":
        source[0] = contents(source[0])
    if name == "benchmarks":
        source[0] += toctree(re.findall(r"\]\(((?:detection|recovery)/[\w-]+)\.md", source[0]))


def setup(app: Any) -> None:
    """Generate the reference, and read the pages through :func:`read_source`."""
    app.connect("builder-inited", lambda app: generate_reference.write_pages(DOCS / "reference"))
    app.connect("source-read", read_source)

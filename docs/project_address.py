"""The address of the repository, which the documentation, the package and the notebooks link to.

It stands in ``setup.cfg`` (``url``). The repository has no public address yet, so ``OWNER`` stands
for the account that will hold it. ``make address ADDRESS=https://github.com/<account>/hf_divguard``
writes the real one into every file that names it; ``make release-check`` names what is missing.
"""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def read_address() -> str:
    """Return the address that ``setup.cfg`` holds."""
    settings = configparser.ConfigParser()
    settings.read(PROJECT / "setup.cfg", encoding="utf-8")
    return settings["metadata"]["url"]


PROJECT_ADDRESS = read_address()
PLACEHOLDER = "https://github.com/OWNER/hf_divguard"


def files_with_the_address() -> list[Path]:
    """Return the files that may name the address: settings, texts and notebooks, without generated ones."""
    patterns = ("setup.cfg", "*.md", "CITATION.cff", "docs/*.md", "docs/packaging/*", "examples/*.md")
    patterns += ("notebooks/*.ipynb",)
    return sorted(path for pattern in patterns for path in PROJECT.glob(pattern))


def write_address(address: str) -> list[Path]:
    """Put ``address`` in the place of the present one in every file; return the files that changed."""
    old, new = (each.removeprefix("https://github.com/") for each in (read_address(), address.rstrip("/")))
    changed = []
    for path in files_with_the_address():
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, new), encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    if not sys.argv[1:] or not sys.argv[1].startswith("https://github.com/"):
        sys.exit("Give the address, for example: make address ADDRESS=https://github.com/account/hf_divguard")
    for file in write_address(sys.argv[1]):
        print(file.relative_to(PROJECT))

"""Checks that version, changelog, citation and address belong together, before a release.

python docs/release_check.py            # what must hold at every commit
python docs/release_check.py --release  # what must hold in addition where the package is published
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT / "docs"))

from project_address import PLACEHOLDER, PROJECT_ADDRESS, files_with_the_address  # noqa: E402


def read(name: str) -> str:
    """Return the text of a file of the project."""
    return (PROJECT / name).read_text(encoding="utf-8")


def version() -> str:
    """Return the version that the package says it has."""
    found = re.search(r'"(.+)"', read("hf_divguard/_version.py"))
    assert found is not None
    return found[1]


def problems(*, is_release: bool) -> list[str]:
    """Return what does not hold, a sentence each.

    Args:
        is_release: Whether the package is about to be published.
    """
    found, number = [], version()
    base, is_development = number.removesuffix(".dev0"), number.endswith(".dev0")
    newest = re.search(r"^## \[(.+?)\] - (.+)$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert newest is not None
    if newest[1] != base:
        found.append(f"The newest section of CHANGELOG.md must be {base}, found {newest[1]}.")
    if is_development != (newest[2] == "unreleased"):
        found.append(
            f"Version {number} and the date {newest[2]!r} of its section in CHANGELOG.md do not fit."
        )
    if f"\nversion: {number}\n" not in read("CITATION.cff"):
        found.append(f"CITATION.cff must give the version {number}.")
    if not is_release:
        return found
    if is_development:
        found.append(f"A release has no .dev0 in its version, found {number} in hf_divguard/_version.py.")
    if PROJECT_ADDRESS == PLACEHOLDER:
        names = [path.name for path in files_with_the_address() if "OWNER/" in path.read_text("utf-8")]
        found.append(
            f"The address of the repository is not filled in ({', '.join(names)}). "
            "Run `make address ADDRESS=https://github.com/<account>/hf_divguard`."
        )
    return found


def main() -> int:
    """Print what does not hold; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", action="store_true", help="as strict as a release needs")
    found = problems(is_release=parser.parse_args().release)
    for sentence in found:
        print(sentence, file=sys.stderr)
    if not found:
        print(f"Version {version()}: changelog, citation and address belong together.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Comparing a checkpoint folder with its manifest."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from hf_divguard.storage.checksums import file_digests
from hf_divguard.storage.manifest import FileEntry, Manifest, missing_rng_files, name_problem
from hf_divguard.storage.names import MANIFEST_NAME, checkpoint_step
from hf_divguard.storage.regular_files import error_words, is_unreadable, kind_in_words, named_file

__all__ = ["check_manifest"]


def check_manifest(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    *,
    checksums: bool | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Compare the files in ``folder`` with ``manifest``; return what is wrong, by file, in words.

    Args:
        folder: The checkpoint folder.
        manifest: What it should hold. Files that it does not name are not looked at.
        checksums: Whether to read the files and compare their checksums. ``None`` does so where
            the manifest has one; ``True`` too; ``False`` compares sizes alone.
        sizes: The sizes of regular files directly in ``folder``, if somebody has just looked at
            them. A file whose size is not there, or is another one, is looked at again.

    Returns:
        One part of a sentence per problem; empty if all is as it should be.

    Raises:
        OSError: If the disk answers with an error that leaves open whether a file is there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_manifest(folder, Manifest(step=20, run_id="a", sequence=1, world_size=1,
        ...                                     files={"optimizer.pt": FileEntry(size=9)}))
        {'optimizer.pt': '`optimizer.pt` is missing'}
    """
    folder = os.fspath(folder)
    problems = dict.fromkeys(
        missing_rng_files(manifest.files, manifest.world_size, manifest.ranks),
        "is missing, also from the manifest",
    )
    real_folders: dict[str, bool] = {"": True}
    known: Mapping[str, int] = sizes or {}
    for name, entry in manifest.files.items():
        if known.get(name) == entry.size:
            continue
        if (problem := _file_problem(folder, name, entry, real_folders)) is not None:
            problems[name] = problem
    if checksums is not False:
        problems |= _changed_files(folder, manifest, problems)
    words = {name: f"{named_file(name)} {problem}" for name, problem in problems.items()}
    step = checkpoint_step(os.path.basename(folder))
    if step is not None and step != manifest.step:
        words[MANIFEST_NAME] = (
            f"`{MANIFEST_NAME}` is of step {manifest.step}, not of {os.path.basename(folder)}"
        )
    return dict(sorted(words.items()))


def _file_problem(folder: str, name: str, entry: FileEntry, real_folders: dict[str, bool]) -> str | None:
    if (problem := name_problem(name)) is not None:
        return problem
    try:
        if not _is_inside(folder, name.rpartition("/")[0], real_folders):
            return "stands in a folder that is a symbolic link"
        status = os.stat(f"{folder}/{name}")
    except OSError as error:
        if is_unreadable(error):
            raise
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return "is missing" if is_missing else f"cannot be read ({error_words(error)})"
    if not stat.S_ISREG(status.st_mode):
        return f"is {kind_in_words(status.st_mode)} instead of a file"
    if status.st_size != entry.size:
        words = "empty" if status.st_size == 0 else "too short" if status.st_size < entry.size else "too long"
        return f"is {words}: {status.st_size} bytes instead of {entry.size}"
    return None


def _is_inside(folder: str, name: str, known: dict[str, bool]) -> bool:
    """Return whether each part of the sub-folder ``name`` is a real folder and no symbolic link."""
    if name not in known:
        known[name] = _is_inside(folder, name.rpartition("/")[0], known) and not stat.S_ISLNK(
            os.lstat(f"{folder}/{name}").st_mode
        )
    return known[name]


def _changed_files(folder: str, manifest: Manifest, known: Mapping[str, str]) -> dict[str, str]:
    """Return the files of the right size whose checksum is another one than in the manifest."""
    sizes = {
        name: entry.size
        for name, entry in manifest.files.items()
        if entry.digest is not None and name not in known
    }
    problems: dict[str, str] = {}
    for name, digest in file_digests(folder, sizes, manifest.algorithm).items():
        if isinstance(digest, OSError) and is_unreadable(digest):
            raise digest
        if not isinstance(digest, str):
            problems[name] = f"cannot be read ({error_words(digest)})"
        elif digest != manifest.files[name].digest:
            problems[name] = f"has other contents than when it was saved: its {manifest.algorithm} differs"
    return problems

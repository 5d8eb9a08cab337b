"""What folders take on the disk, each file once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["DiskUsage"]


@dataclass
class DiskUsage:
    """The files below some folders, each file once.

    Args:
        sizes: Bytes of the files of each folder that have one name only.
        links: The other names: folder, file, number of its names, bytes.
        is_complete: Whether all folders could be read.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    links: list[tuple[str, tuple[int, int], int, int]] = field(default_factory=list)
    is_complete: bool = True

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values()) + sum({file: size for _, file, _, size in self.links}.values())

    def freed_by(self, folders: Iterable[str]) -> int:
        """Return the bytes that are freed if ``folders`` are deleted: not those with a name elsewhere."""
        gone = set(folders)
        names: dict[tuple[int, int], list[int]] = {}
        for folder, file, count, size in self.links:
            if folder in gone:
                names.setdefault(file, [0, count, size])[0] += 1
        shared = sum(size for seen, count, size in names.values() if seen >= count)
        return sum(self.sizes.get(folder, 0) for folder in gone) + shared

    def size_of(self, folder: str) -> int:
        """Return the bytes of the files in ``folder``."""
        return self.sizes.get(folder, 0) + sum(size for other, _, _, size in self.links if other == folder)

    def look_at(self, top: str) -> dict[str, int]:
        """Add what stands in the folder ``top``; return the sizes of the files directly in it, by name.

        Symbolic links are not followed, count nothing and are not returned.
        """
        size = 0
        direct: dict[str, int] = {}
        waiting = [] if os.path.islink(top) else [top]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(status.st_mode):
                            waiting.append(entry.path)
                            continue
                        if not stat.S_ISREG(status.st_mode):
                            continue
                        if folder is top:
                            direct[entry.name] = status.st_size
                        if status.st_nlink == 1:
                            size += status.st_size
                        else:
                            file = (status.st_dev, status.st_ino)
                            self.links.append((top, file, status.st_nlink, status.st_size))
            except (FileNotFoundError, NotADirectoryError):
                continue  # deleted by the run meanwhile
            except OSError:
                self.is_complete = False
        self.sizes[top] = size
        return direct

    def forget(self, top: str) -> None:
        """Take the folder ``top`` out again."""
        self.sizes.pop(top, None)
        self.links = [each for each in self.links if each[0] != top]

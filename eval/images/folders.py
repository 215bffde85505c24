"""Files of a folder and of all folders in it, those that links lead to included."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from diffaccel.eval.images.names import natural


@dataclass
class Files:
    """Files below a folder.

    Attributes:
        names: paths below the folder, with slashes.
        broken: links that lead nowhere.
        again: links to folders whose files are counted already: the folder itself, one above a link, or another name.
    """

    names: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)


def files_below(path: Path) -> Files:
    """List the files below a folder. Links are followed; no folder is entered twice, so that no link is a loop.

    Folders that lie below ``path`` themselves come before those that are linked.
    """
    files, links, entered = Files(), [""], set[tuple[int, int]]()
    while links:
        start = links.pop(0)
        links += sorted(_walk(path, start, files, entered), key=natural)
    return files


def _walk(path: Path, start: str, files: Files, entered: set[tuple[int, int]]) -> list[str]:
    """Add the files below one folder, and return the links to folders that were met."""
    links: list[str] = []
    for folder, folders, entries in os.walk(f"{path}/{start}" if start else path):
        below = Path(folder).relative_to(path).as_posix()
        if (identity := _identity(folder)) in entered:
            files.again.append(below)
            folders.clear()
            continue
        entered.add(identity)
        prefix = "" if below == "." else f"{below}/"
        links += [f"{prefix}{name}" for name in folders if os.path.islink(f"{folder}/{name}")]
        for name in entries:
            if os.path.isfile(f"{folder}/{name}"):
                files.names.append(f"{prefix}{name}")
            elif os.path.islink(f"{folder}/{name}"):
                files.broken.append(f"{prefix}{name}")
    return links


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino

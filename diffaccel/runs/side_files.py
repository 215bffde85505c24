"""The files that a search, or another loop with a report, leaves beside the pictures of a chunk.

They lie in ``search/NUMBER`` or ``traces/NUMBER``. A marker and the record list them with their sha256, as they list
pictures; records of earlier versions do not, and then there is nothing to check.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffaccel import record
from diffaccel.files import sha256

TRACES = "traces"  # the same for loops that are no search and leave files
SEARCH = "search"  # subfolder where searches leave their traces, one folder for each call
_KEPT = re.compile(
    r"rewards\.jsonl|latents\.safetensors|trace\.json|reward\.png|density\.json|density\.png|\d{3,}-\d+_.*\.png"
)
_LOCK = ".lock"


def of_chunk(run: Path, number: int) -> dict[str, list[dict[str, str]]]:
    """Return what marker and record say of the files that a chunk's call has left; nothing where it left none."""
    found = [
        {"folder": kind, "file": file.name, "sha256": sha256(file)}
        for kind in (SEARCH, TRACES)
        for file in sorted((run / kind / f"{number:05d}").glob("*"))
        if _KEPT.fullmatch(file.name) and file.is_file()
    ]
    return {"side_files": found} if found else {}


def remove_changed(run: Path, entry: Mapping[str, Any]) -> None:
    """Remove the files of a chunk that are not those that were listed: its call would go on from them."""
    for file, digest in record.side_files(run, [entry]):
        if _KEPT.fullmatch(file.name) and file.is_file() and sha256(file) != digest:
            file.unlink()


def remove_all(run: Path) -> None:
    """Remove the files of every chunk, and the folders in which nothing else is."""
    for folder in _folders(run):
        for file in folder.iterdir() if folder.is_dir() else ():
            if (file.name == _LOCK or _KEPT.fullmatch(file.name)) and file.is_file():
                file.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails when something else is in it


def _folders(run: Path) -> Iterator[Path]:
    for kind in (SEARCH, TRACES):
        yield from (run / kind).glob("[0-9]*")

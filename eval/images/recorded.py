"""What the record of a run says of its files: that they are all made, and which bytes each of them has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.files import sha256
from diffaccel.record import side_files, written_files

THREADS = 8  # hashing releases the interpreter's lock, and waits for the disk


def check_finished(run: dict[str, Any], path: str | Path) -> None:
    """Refuse the record of an unfinished run."""
    if run["state"] != "finished":
        raise DiffAccelError(f"The run in '{path}' is unfinished. Repeat the command that made it; it goes on.")


def check_files(run: dict[str, Any], folder: Path) -> None:
    """Refuse a folder with a picture, video, latents or a search's file that are not those of its record.

    Missing ones are not looked at. A copy of another run's files over these has the same names, so names do not tell.
    """
    listed = [*written_files(folder, run["images"]), *side_files(folder, run.get("chunks", ()))]
    present = [(file, digest) for file, digest in listed if digest is not None and file.is_file()]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(sha256, [file for file, _ in present])
        changed = next((file for (file, digest), got in zip(present, found, strict=True) if got != digest), None)
    if changed is not None:
        raise DiffAccelError(
            f"'{changed}' has been changed since its run wrote it. Repeat the command that made the run, which draws "
            "it anew, or take run.json away to use the folder as one of any pictures."
        )

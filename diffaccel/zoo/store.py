"""The cache of unpacked models: each is written once, atomically, safely with several processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_text
from diffaccel.zoo import packing

CACHE_VARIABLE = "DIFFACCEL_CACHE"
RECORD = "materialised.json"
_STALE_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Return the folder of unpacked models: in ``$DIFFACCEL_CACHE``, else in the user's cache folder."""
    root = os.environ.get(CACHE_VARIABLE)
    if root:
        return Path(root).expanduser() / "zoo"
    import platformdirs

    return Path(platformdirs.user_cache_dir("diffaccel", appauthor=False)) / "zoo"


def materialise(packed: str | Path, name: str, *, verify: bool = False) -> Path:
    """Return the plain folder of a packed model, unpacked on the first call.

    Files are read and compared with their sha256 when they may have changed: when inode, time of change or size are
    others than when they were read last. ``verify=True`` reads all of them. A folder that differs is unpacked again.
    Two processes may do so at once: each writes its own copy beside the target, and the first rename wins.

    Raises:
        DiffAccelError: when the cache folder cannot be written, or the packed files are damaged.
    """
    packed = Path(packed)
    manifest = packing.read_manifest(packed)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
    root = cache_dir()
    target = root / f"{name}-{digest}"
    if _intact(target, verify):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        fresh = root / f".{target.name}.{uuid.uuid4().hex}.tmp"
        try:
            packing.unpack(packed, fresh)
            record = {"model": name, "files": packing.fingerprints(fresh)}
            record["read"] = _states(fresh, record["files"])
            (fresh / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
            _flush(fresh)
            _publish(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise DiffAccelError(
            f"Model '{name}' cannot be written to the cache folder '{root}' ({error.strerror or error}); "
            f"free some space, or set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    return target


def _publish(fresh: Path, target: Path) -> None:
    """Rename ``fresh`` to ``target``; a damaged target is moved away, one that another process completed stays."""
    for _ in range(8):
        try:
            os.rename(fresh, target)
            return
        except OSError:
            if _intact(target, verify=True):
                return
            damaged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
    raise DiffAccelError(f"'{target}' keeps changing while it is replaced; remove that folder and try again.")


def _intact(target: Path, verify: bool) -> bool:
    """Return whether a folder holds the files of its record, and note in it which states of the files were read."""
    try:
        record: dict[str, Any] = json.loads((target / RECORD).read_text())
        files = record["files"]
        read = {} if verify else record.get("read", {})
        states = _states(target, files)
        unread = {name: entry for name, entry in files.items() if read.get(name) != states[name]}
        packing.verify(target, unread, "Cached model file", "it is made again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # DiffAccelError is a ValueError
        return False
    if record.get("read") != states:
        with contextlib.suppress(OSError):  # a cache that cannot be written is read every time
            write_text(target / RECORD, json.dumps({**record, "read": states}, indent=1, sort_keys=True))
    return True


def _states(folder: Path, files: Iterable[str]) -> dict[str, list[int]]:
    """Return inode, time of change in nanoseconds and size of files: they change when a file is written."""
    status = {name: (folder / name).stat() for name in files}
    return {name: [entry.st_ino, entry.st_mtime_ns, entry.st_size] for name, entry in status.items()}


def _flush(folder: Path) -> None:
    """Wait until all files of a folder are on the disk, so that no crash leaves its name without its contents."""
    for path in (*folder.rglob("*"), folder):
        with contextlib.suppress(PermissionError):  # of folders on Windows
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _sweep(root: Path) -> None:
    """Remove incomplete folders that a killed process left a day or more ago."""
    for path in root.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

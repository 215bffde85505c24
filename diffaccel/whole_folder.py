"""A folder of a saved model that is whole or not yet there: a kill while it is written leaves neither half of one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffaccel import folder_lock
from diffaccel.errors import DiffAccelError
from diffaccel.files import as_os_errors, obstacle

PARTIAL = ".partial"  # subfolder of what is being written; what an unfinished run left has one
_LAST = ("model_index.json", "config.json")  # without which nothing loads the folder


def unwritable(path: Path, why: OSError | str) -> DiffAccelError:
    """Return the error for an output folder that cannot be used."""
    text = why if isinstance(why, str) else why.strerror or str(why)
    return DiffAccelError(f"The output folder '{path}' cannot be written ({text}). Choose another with --out.")


def check_writable(path: Path) -> None:
    """Raise when ``path`` is no folder, or could not be created or written; nothing is created."""
    try:
        reason = obstacle(path)
    except OSError as error:
        raise unwritable(path, error) from error
    if reason:
        raise unwritable(path, reason)


def check_free(out: Path, overwrite: bool) -> None:
    """Raise unless a folder can be written and is empty, of a save that was killed, or may be thrown away."""
    check_writable(out)
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not overwrite and PARTIAL not in names and names - {folder_lock.NAME}:
        raise DiffAccelError(f"'{out}' is not empty. Give another --out, or --overwrite to throw it away.")


@contextlib.contextmanager
def whole_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write to, whose contents become those of ``out`` when the block succeeds.

    What is in ``out`` stays until then, and where the block fails. No other run can write ``out`` meanwhile.

    Raises:
        DiffAccelError: for a folder that cannot be written, that another run writes, or that is not free.
    """
    is_new = not out.exists()
    own = folder_lock.FolderLock(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        own.acquire()
        check_free(out, overwrite)  # another run may have come in between
        partial = out / PARTIAL
        _remove(partial)
        partial.mkdir()
        try:
            with as_os_errors():
                yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if overwrite:
            clear(out, keep=(PARTIAL, folder_lock.NAME))
        for path in sorted(partial.iterdir(), key=lambda path: (path.name in _LAST, path.name)):
            _remove(out / path.name)
            path.rename(out / path.name)
        partial.rmdir()
    except OSError as error:
        if error.errno is None:  # a library's own
            raise
        raise unwritable(out, error) from error
    finally:
        own.release()
        with contextlib.suppress(OSError):
            if is_new:
                out.rmdir()  # fails when something is in it


def clear(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove everything in a folder but the names in ``keep``."""
    for path in folder.iterdir():
        if path.name not in keep:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

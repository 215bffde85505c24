"""One writer a folder: a lock of the operating system, which ends with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from diffaccel.errors import DiffAccelError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)


class FolderLock:
    """The lock of a folder that one process writes; its file is there while it is held.

    A file that a killed process left is taken over. Where the file system has no locks, nothing is locked.

    Args:
        folder: to be locked; it must exist when the lock is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock, unless it is held already.

        Raises:
            DiffAccelError: when another process, or another run of this one, holds it.
            OSError: when the folder cannot be written.
        """
        while self._file is None and fcntl is not None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(file, 200, 0).decode(errors="replace").strip()
                os.close(file)
                if error.errno not in _TAKEN:  # a file system without locks
                    return
                raise DiffAccelError(
                    f"'{self.path.parent}' is being written by another run{f' ({owner})' if owner else ''}. Wait "
                    "until it has ended, or choose another folder, by --out or folder=."
                ) from None
            if not self._is_current(file):  # the last owner removed the file after it was opened here
                os.close(file)
                continue
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._file = file

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and give the lock back; nothing happens when it is not held."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            if self._is_current(file):
                self.path.unlink()  # while it is locked: nobody else can hold it
        os.close(file)

"""The number of CPU threads of a run: checked before any work, set for a block, put back after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from diffaccel.errors import DiffAccelError

MOST_THREADS = 1024  # where a system has no room for so many as are asked for, the process ends without a word


def check_threads(count: int, name: str) -> None:
    """Raise for a number of threads that cannot be; 0 leaves torch's own."""
    if not 0 <= count <= MOST_THREADS:
        raise DiffAccelError(
            f"{name} is {count}; it must be at least 0, for torch's own number, and at most {MOST_THREADS}."
        )


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set torch's number of CPU threads inside the block; 0 leaves it."""
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)

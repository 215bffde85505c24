"""A line now and then while something takes long, so that nobody takes it for one that hangs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from diffaccel.eval.timing.pace import duration

EVERY = 25.0  # seconds between lines


@contextlib.contextmanager
def heartbeat(name: str, progress: Callable[[str], None], every: float = EVERY) -> Iterator[None]:
    """Say every so many seconds of the block how long it has taken.

    Args:
        name: of what takes long.
        progress: called with a line of text, from another thread.
        every: seconds between lines.
    """
    ended, begin = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(every):
            progress(f"  {name}: {duration(time.monotonic() - begin)} so far")

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

"""Signals that end a command: TERM and HUP interrupt it as Ctrl-C does, also while it waits for other processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

GRACE_SECONDS = 2.0  # in which a process of a launch may end by itself


@contextlib.contextmanager
def interrupting(received: list[int], report: Callable[[str], None]) -> Iterator[None]:
    """Let TERM and HUP interrupt the block as Ctrl-C does, and append their numbers to ``received``.

    Signals that the caller ignores or handles are left alone, as nohup asks. A process of a launch that waits for the
    others, where no interrupt arrives, reports the signal and ends on its own.

    Args:
        received: numbers of the signals that arrived.
        report: writes one sentence.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        with _deadline(report) if numbers and "RANK" in os.environ else contextlib.nullcontext():
            yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _deadline(report: Callable[[str], None]) -> Iterator[None]:
    """End the process when the block goes on for longer than :data:`GRACE_SECONDS` after a signal.

    Python's handlers wait for the main thread, which may be inside a collective of torch. The interpreter writes the
    number of a signal to a pipe at once, where a thread reads it.
    """
    if sys.platform == "win32":
        yield
        return
    ended = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        for number in iter(lambda: int.from_bytes(os.read(reader, 1), "little"), 0):
            if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) and not ended.wait(GRACE_SECONDS):
                report(f"Stopped by {signal.Signals(number).name} while waiting for the other processes.")
                os._exit(128 + number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.close(writer)
        thread.join()
        os.close(reader)

"""Signals that stop a training run between two steps, where its state is whole and can be kept."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

NOTE = b"Stopping after this step, whose state is kept; a second signal stops at once.\n"


class StopBetweenSteps:
    """Hold Ctrl-C, TERM and HUP back until the block has ended, so that it can end its step and write a checkpoint.

    A second signal acts at once. Signals that do not interrupt Python code (ignored ones, and those that kill) are left
    alone, and so is every signal outside of the main thread, or where ``holds`` is False: processes that wait for each
    other in a step cannot choose where they stop.

    Attributes:
        asked: whether a signal has arrived.
    """

    def __init__(self, holds: bool = True) -> None:
        self.asked = False
        self._holds = holds and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._number = 0

    def __enter__(self) -> Self:
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        for number in numbers if self._holds else ():
            if callable(handler := signal.getsignal(number)):
                self._before[number] = handler
                signal.signal(number, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._before[number](number, frame)
        self.asked, self._number = True, number
        with contextlib.suppress(OSError):  # not through a stream, which this may have interrupted
            os.write(2, NOTE)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked and kind is None:
            self._before[self._number](self._number, None)

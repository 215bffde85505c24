"""Exceptions raised at every line of chosen modules while a call runs, as an interrupt by the keyboard may come."""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

Visit = tuple[str, int, int]  # file, line, and the how-manieth visit of that line


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which would end the test run where a test lets it pass."""


@contextmanager
def tracing(modules: list[ModuleType], visit: Callable[[Visit], None]) -> Iterator[None]:
    """Call ``visit`` before every line of ``modules`` that the block runs."""
    files = {str(module.__file__) for module in modules}
    counts: Counter[tuple[str, int]] = Counter()

    def at_line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            counts[line] += 1
            visit((*line, counts[line]))
        return at_line

    def at_call(frame: FrameType, event: str, arg: Any) -> Any:
        return at_line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(before)


def visits(modules: list[ModuleType], call: Callable[[], Any]) -> list[Visit]:
    """Return the first and the last visit of every line that ``call`` runs in ``modules``, in order.

    The line that closes a lock is left out: the interpreter looks for signals after calls and at jumps, not there.
    """
    all_visits: list[Visit] = []
    with tracing(modules, all_visits.append):
        call()
    last = {visit[:2]: visit for visit in all_visits}
    return [
        visit
        for visit in all_visits
        if visit[2] == 1 or (visit == last[visit[:2]] and "with self.lock" not in linecache.getline(*visit[:2]))
    ]


def interrupt(modules: list[ModuleType], at: Visit, call: Callable[[], Any]) -> BaseException | None:
    """Run ``call`` with an exception raised at one line, and return what came out of it.

    The exception keeps its frames, and so everything that they hold, alive, as an interactive session does.
    """

    def visit(current: Visit) -> None:
        if current == at:
            sys.settrace(None)
            raise Interrupted

    try:
        with tracing(modules, visit):
            call()
    except BaseException as error:
        return error
    return None

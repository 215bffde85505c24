"""One call at a time on a pipeline, and what a call changes on it put back, also after an interrupt at any line.

A call swaps attributes of objects that the caller keeps: networks and methods of the pipeline, methods of its
scheduler and VAE, hooks. What restores them is noted here, outside of these objects, before anything is swapped, and
stays noted until it has run. A restoring that an interrupt cuts off is thus repeated when the call unwinds or, at the
latest, when the pipeline is called again or freed of its methods. So is that of a call of another thread in the midst
of which this process was forked: the child has the changes of that call and not its thread.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from diffaccel.errors import DiffAccelError

_MISSING = object()


class Busy(DiffAccelError):
    """A call of a pipeline that another thread calls."""

    def __init__(self) -> None:
        super().__init__(
            "The pipeline is busy: another thread is calling it, or a pipeline with the same scheduler, and on_busy is "
            "'refuse'. Call it when that call has ended, or let calls wait: diffaccel.accelerate(..., on_busy='wait')."
        )


class _Guard:
    """The lock of one object, and what puts back its parts.

    Attributes:
        thread: the thread that holds the lock. It may be an old one while nobody does.
        restores: functions that may be called twice, each noted before the change that it undoes.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None
        self.restores: list[Callable[[], None]] = []

    def is_held_here(self) -> bool:
        """Return whether a call of this thread holds the lock."""
        return self.thread == threading.get_ident() and self.lock.locked()

    def run(self, function: Callable[[], Any], waits: bool) -> Any:
        """Call ``function`` while no other thread is here; calls within it pass.

        Raises:
            Busy: another thread is here, and this one does not wait.
        """
        if self.is_held_here():
            return function()
        if not waits and self.lock.locked():
            raise Busy
        with self.lock:  # no context manager of our own: an interrupt as it opens would leave the lock closed
            return self._run_and_restore(function)

    def leave_to_child(self) -> None:
        """Free the lock in a forked process, which has none of the parent's threads but the one that forked."""
        if self.lock.locked() and self.thread != threading.get_ident():
            self.lock, self.thread = threading.Lock(), None  # what that call changed is put back by the next one

    def _run_and_restore(self, function: Callable[[], Any]) -> Any:
        try:
            self.thread = threading.get_ident()
            self.restore_from(0)
            return function()
        finally:
            try:
                self.restore_from(0)
            finally:
                self.thread = None

    def restore_from(self, start: int) -> None:
        """Call the noted functions, the latest first, down to number ``start``."""
        while len(self.restores) > start:
            restore = self.restores[-1]
            try:
                restore()
            except Exception:
                self.restores.pop()  # it would fail again
                raise
            self.restores.pop()


_GUARDS: WeakKeyDictionary[Any, _Guard] = WeakKeyDictionary()


def _guard(owner: Any) -> _Guard:
    _watch_forks()
    return _GUARDS.setdefault(owner, _Guard())


@functools.cache
def _watch_forks() -> None:
    """Free locks in forked processes from now on: the threads that hold them do not exist there."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
        os.register_at_fork(after_in_child=_leave_to_child)


def _leave_to_child() -> None:
    for guard in list(_GUARDS.values()):
        guard.leave_to_child()


def alone(pipe: Any, function: Callable[[], Any], *, waits: bool = True) -> Any:
    """Return ``function()``, called while no other thread calls ``pipe``.

    A second thread waits, also one that calls another accelerated pipeline of the same scheduler. What an interrupted
    call left on the pipeline is put back before and after.

    Args:
        waits: False refuses the second thread instead.

    Raises:
        Busy: another thread calls the pipeline, and this one does not wait.
    """
    guard, scheduler = _guard(pipe), getattr(pipe, "scheduler", None)
    if scheduler is None:
        return guard.run(function, waits)
    return _guard(scheduler).run(lambda: guard.run(function, waits), waits)


def is_called_here(pipe: Any) -> bool:
    """Return whether a call of ``pipe`` is running in this thread, as where a callback asks."""
    return _guard(pipe).is_held_here()


@contextlib.contextmanager
def restored(pipe: Any, restore: Callable[[], None]) -> Iterator[None]:
    """Call ``restore`` at the end of the block, or when :func:`alone` ends where an interrupt prevents that.

    Args:
        pipe: the pipeline whose call makes the changes.
        restore: undoes the changes of the block; must do no harm when called twice, or before any change.
    """
    guard = _guard(pipe)
    if not guard.is_held_here():
        try:
            yield
        finally:
            restore()
        return
    try:
        guard.restores.append(restore)
        yield
    finally:
        if restore in guard.restores:  # an interrupted block may end late, after everything was put back
            guard.restore_from(guard.restores.index(restore))


def attributes_of(owner: Any, names: list[str]) -> Callable[[], None]:
    """Return a function that gives ``owner`` the instance attributes ``names`` that it has now, or none."""
    before = {name: vars(owner).get(name, _MISSING) for name in names}

    def restore() -> None:
        for name, value in before.items():
            if value is _MISSING:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value

    return restore


def contents_of(owner: Any) -> Callable[[], None]:
    """Return a function that gives ``owner`` all the instance attributes that it has now, and no others."""
    before = dict(vars(owner))

    def restore() -> None:
        vars(owner).update(before)
        for name in [name for name in vars(owner) if name not in before]:
            vars(owner).pop(name, None)

    return restore

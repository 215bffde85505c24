"""Work done ahead of whoever takes its results: in threads, or in processes where there is much of it and many cores.

Threads feed a GPU where others run while one works: torch's operators do so, Pillow only while it decodes. Processes
always do, but are slow to start. They are forked by torch's own loader, and send what they made through shared memory,
a whole batch at a time.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
MANY, CORES = 2000, 4  # items and cores from which processes are worth their start
_MOST = 16  # threads or processes
_EACH = 4  # items that a thread takes at once: handed over one by one they keep threads waiting for each other
_WAITING = 2  # batches of each process that nobody has taken yet
_SHARED = Path("/dev/shm")  # what waits lies here; containers often have little of it


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None, each: int = 1
) -> Iterator[Result]:
    """``map`` in threads, which take ``each`` items at once, in order, with a bounded number of results waiting."""
    workers = workers or _suits(os.cpu_count() or 1)
    waiting: deque[Future[list[Result]]] = deque()
    left = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while some := list(itertools.islice(left, each)):
                waiting.append(pool.submit(lambda some: [function(item) for item in some], some))
                if len(waiting) > max(8 * workers // each, workers):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:  # left early: by an error, or by whoever took the results
            for future in waiting:
                future.cancel()


def groups(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    size: int,
    *,
    processes: int | None = None,
    pinned: bool = False,
) -> Iterator[Tensor | list[Result]]:
    """``function`` of every item, in order, ``size`` results at a time; tensors of one shape come as one tensor.

    Args:
        function: of an item; whatever it raises comes out here.
        items: all of them.
        size: results in a group.
        processes: that work; 0 works in threads. By default the number that suits the count of items and cores.
        pinned: tensors come in memory that a GPU copies from while it works.
    """
    if processes is None:
        processes = _worth(function, items, size)
    if processes == 0:
        results = ahead(function, items, each=_EACH)
        while some := list(itertools.islice(results, size)):
            yield _together(some, pinned)
        return
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        _Calls(function, items),  # type: ignore[arg-type]
        batch_size=size, collate_fn=_collate, num_workers=processes, prefetch_factor=_WAITING,
        multiprocessing_context="fork", pin_memory=pinned,
    )  # fmt: skip
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield found


def _suits(cores: int) -> int:
    """How many work; some cores are left to whoever takes the results: a GPU that waits for a thread costs more."""
    return min(_MOST, cores - cores // 4)


def _worth(function: Callable[[Item], Any], items: Sequence[Item], size: int) -> int:
    """How many processes; 0 where few items, few cores or little shared memory make threads better."""
    cores = os.cpu_count() or 1
    if len(items) < MANY or cores < CORES or sys.platform != "linux":
        return 0
    most = _suits(cores)
    if isinstance(one := function(items[0]), Tensor):
        free = os.statvfs(_SHARED)
        room = free.f_bavail * free.f_frsize // 2  # others may use it too
        most = min(most, room // (_WAITING * size * one.nbytes))
    return most if most > 1 else 0


class _Calls:
    """A dataset of calls. An error is a result: the loader would wrap it in the text of a traceback."""

    def __init__(self, function: Callable[[Item], Any], items: Sequence[Item]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.items[index])
        except Exception as error:
            return error


def _collate(found: list[Any]) -> Any:
    return next((one for one in found if isinstance(one, Exception)), None) or _together(found)


def _together(found: list[Any], pinned: bool = False) -> Any:
    """One tensor where all have one shape: a message costs by its tensors, not by its bytes."""
    if not all(isinstance(one, Tensor) for one in found) or len({one.shape for one in found}) > 1:
        return found
    out = torch.empty(len(found), *found[0].shape, dtype=found[0].dtype, pin_memory=True) if pinned else None
    return torch.stack(found, out=out)

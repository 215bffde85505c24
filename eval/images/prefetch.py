"""Read ahead: map a function over items before the consumer asks, in threads or in forked processes.

Threads feed a GPU where they let each other run while one works: torch's operators do so, Pillow only while it decodes.
Processes always do, but are slow to start, so they are used for many items on many cores. They are forked by torch's
DataLoader, and send their results through shared memory, a whole batch at a time.
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
MIN_ITEMS, MIN_CORES = 2000, 4  # items and cores from which processes are worth their start
_MAX_WORKERS = 16  # threads or processes
_CHUNK = 4  # items a thread takes at once: handed over one by one, they make threads wait for each other
_PREFETCHED = 2  # batches of each process that wait for the consumer
_SHARED_MEMORY = Path("/dev/shm")  # holds the waiting batches; containers often have little of it


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None, chunk: int = 1
) -> Iterator[Result]:
    """Map ``function`` over ``items`` in threads, in order, with a bounded number of results waiting.

    Args:
        function: of an item; whatever it raises is raised where its result would come.
        items: any number of them.
        workers: number of threads; by default what suits the number of cores.
        chunk: items that a thread takes at once.
    """
    workers = workers or _worker_count(os.cpu_count() or 1)
    pending: deque[Future[list[Result]]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while batch := list(itertools.islice(remaining, chunk)):
                pending.append(pool.submit(lambda batch: [function(item) for item in batch], batch))
                if len(pending) > max(8 * workers // chunk, workers):
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:  # also after an error, or when the consumer stops early
            for future in pending:
                future.cancel()


def map_batches(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    size: int,
    *,
    processes: int | None = None,
    pinned: bool = False,
) -> Iterator[Tensor | list[Result]]:
    """Map ``function`` over ``items``, in order, ``size`` results at a time; tensors of one shape are stacked.

    Args:
        function: of an item; whatever it raises is raised here.
        items: all of them.
        size: results in a batch.
        processes: number of worker processes; 0 works in threads. By default what suits the items and cores.
        pinned: return tensors in page-locked memory, from which a GPU copies while it computes.
    """
    if processes is None:
        processes = _process_count(function, items, size)
    if processes == 0:
        results = ahead(function, items, chunk=_CHUNK)
        while batch := list(itertools.islice(results, size)):
            yield _stack_if_equal(batch, pinned)
        return
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        _Calls(function, items),  # type: ignore[arg-type]
        batch_size=size, collate_fn=_collate, num_workers=processes, prefetch_factor=_PREFETCHED,
        multiprocessing_context="fork", pin_memory=pinned,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _worker_count(cores: int) -> int:
    """Return the number of workers. Some cores stay free for the consumer: a GPU that waits for it costs more."""
    return min(_MAX_WORKERS, cores - cores // 4)


def _process_count(function: Callable[[Item], Any], items: Sequence[Item], size: int) -> int:
    """Return the number of processes; 0 where few items, few cores or little shared memory favour threads."""
    cores = os.cpu_count() or 1
    if len(items) < MIN_ITEMS or cores < MIN_CORES or sys.platform != "linux":
        return 0
    count = _worker_count(cores)
    if isinstance(result := function(items[0]), Tensor):
        status = os.statvfs(_SHARED_MEMORY)
        available = status.f_bavail * status.f_frsize // 2  # half of it is left to other programs
        count = min(count, available // (_PREFETCHED * size * result.nbytes))
    return count if count > 1 else 0


class _Calls:
    """Dataset of calls. An error is returned as a result: the loader would wrap it in the text of a traceback."""

    def __init__(self, function: Callable[[Item], Any], items: Sequence[Item]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.items[index])
        except Exception as error:
            return error


def _collate(results: list[Any]) -> Any:
    """Return the first error among the results, or else the results as one batch."""
    error = next((result for result in results if isinstance(result, Exception)), None)
    return error or _stack_if_equal(results)


def _stack_if_equal(results: list[Any], pinned: bool = False) -> Any:
    """Stack tensors of one shape: a message between processes costs by its tensors, not by its bytes."""
    if not all(isinstance(result, Tensor) for result in results) or len({result.shape for result in results}) > 1:
        return results
    out = torch.empty(len(results), *results[0].shape, dtype=results[0].dtype, pin_memory=True) if pinned else None
    return torch.stack(results, out=out)

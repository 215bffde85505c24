"""Images read ahead of whoever takes them: in threads, or in processes where there are many images and cores.

Pillow lets threads run only while it decodes; what surrounds that takes turns, so threads do not feed a GPU. Processes
do. They are forked by torch's own loader, and send what they read through shared memory, several images at a time.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
MANY, CORES = 2000, 4  # images and cores from which processes are worth their start
_MOST = 16  # threads or processes
_TOGETHER = 16  # images in one message


def ahead(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None) -> Iterator[Result]:
    """``map`` in threads, in order, with a bounded number of results waiting. Pillow and hashlib let threads run."""
    workers = workers or min(_MOST, os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 8 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # left early: by an error, or by whoever took the results
            for future in waiting:
                future.cancel()


def images(
    read: Callable[[int], Tensor], positions: Sequence[int], *, processes: int | None = None
) -> Iterator[Tensor]:
    """What ``read`` returns for every position, in order.

    Args:
        read: from a position to an image; whatever it raises comes out here.
        processes: that read; 0 reads in threads. By default the number that suits the count of images and cores.
    """
    if processes is None:
        cores = os.cpu_count() or 1
        worth = len(positions) >= MANY and cores >= CORES and sys.platform == "linux"
        processes = min(_MOST, cores) if worth else 0
    if processes == 0:
        yield from ahead(read, positions)
        return
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        _Reader(read, positions),  # type: ignore[arg-type]
        batch_size=_TOGETHER, collate_fn=_together, num_workers=processes, multiprocessing_context="fork",
    )  # fmt: skip
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield from found


class _Reader:
    """A dataset of positions. An error is a result: the loader would wrap it in the text of a traceback."""

    def __init__(self, read: Callable[[int], Tensor], positions: Sequence[int]) -> None:
        self.read, self.positions = read, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Tensor | Exception:
        try:
            return self.read(self.positions[index])
        except Exception as error:
            return error


def _together(found: list[Tensor | Exception]) -> Tensor | list[Tensor] | Exception:
    """One tensor where all have one shape: a message costs by its tensors, not by its bytes."""
    tensors = [image for image in found if isinstance(image, Tensor)]
    if len(tensors) < len(found):
        return next(error for error in found if isinstance(error, Exception))
    return torch.stack(tensors) if len({image.shape for image in tensors}) == 1 else tensors

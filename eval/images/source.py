"""Anything that holds images: a folder, a zip, an npz or a tensor, read in one stable order as uint8 RGB."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.images import prefetch as reading
from diffaccel.eval.images.decode import Data
from diffaccel.eval.images.prefetch import ahead

_OVERSHOOT = 1 / 255  # of the declared range: what rounding in low precision may add, not another range


def to_uint8(x: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The one conversion to 8 bits: ``round(255 clamp((x - low) / (high - low), 0, 1))``, of any shape.

    Rounding, not truncation: every level k/255 survives float32, float16 and bfloat16, and the way through [-1, 1].
    uint8 passes as it is.

    Raises:
        DiffAccelError: for another dtype, for values outside the declared range, and for ones that are not finite.
    """
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise DiffAccelError(
            f"Images must be uint8, or floats of a declared range; got {x.dtype}. Convert them to uint8."
        )
    x = x.detach().to(torch.float32)
    if x.numel() and not (finite := torch.isfinite(x)).all():
        first = int((~finite.flatten()).nonzero()[0])
        raise DiffAccelError(
            f"Images hold {int((~finite).sum())} values that are not finite, the first at flat index {first}. "
            "Look at the network that made them."
        )
    slack = _OVERSHOOT * (high - low)
    if x.numel() and (float(x.min()) < low - slack or float(x.max()) > high + slack):
        raise DiffAccelError(
            f"Images hold values from {float(x.min()):.4g} to {float(x.max()):.4g}, but the declared range is {low:g} "
            f"to {high:g}. Declare the right one, such as to_uint8(x, low=-1), or clamp them first."
        )
    return ((x - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)


@dataclass
class Source:
    """Images in the order of their ids.

    Attributes:
        name: how reports call it.
        kind: "folder", "zip", "npz", "tensor", or "statistics" for an npz that holds none, only a mean and covariance.
        ids: one for each image: the path without its suffix, or a running number.
        files: the file of each id, where there are files.
        sizes: how many images have each (height, width).
        warnings: what a report must say about them.
        path: where it was read from.
        threads: reading an image lets other threads run, so that many of them feed a GPU.
    """

    name: str
    kind: str
    ids: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    path: Path | None = None
    threads: bool = False
    image: Callable[[int], Tensor] = field(default=lambda index: _nothing(), repr=False)  # position to uint8 (3, H, W)
    content: Callable[[int], Data] = field(default=lambda index: _nothing(), repr=False)  # what decides its pixels
    block: Callable[[Sequence[int]], Tensor] | None = field(default=None, repr=False)  # several at once, if it is cheap

    def __len__(self) -> int:
        return len(self.ids)

    def batches(
        self,
        size: int = 64,
        *,
        within: Sequence[int] | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        processes: int | None = None,
        pinned: bool = False,
    ) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Ids and images ``(B, 3, H, W)`` with ``B <= size``, read ahead.

        A batch holds images of one size. With several sizes, batches come in another order than ids: the ids tell.

        Args:
            size: most images in a batch.
            within: the positions to read, in that order; all by default.
            prepare: applied to each image ``(3, H, W)`` where it was read.
            processes: that read; by default threads, or processes where there are many images and cores.
            pinned: what is read comes in memory that a GPU copies from while it works.

        Raises:
            DiffAccelError: for a source of statistics, and for an image that cannot be read, naming it.
        """
        if self.kind == "statistics":
            _nothing(self.name)
        if size < 1:
            raise DiffAccelError(f"A batch holds at least 1 image; got batch size {size}.")
        positions = range(len(self)) if within is None else within
        if self.block is not None and prepare is None:
            for start in range(0, len(positions), size):
                some = positions[start : start + size]
                yield tuple(self.ids[i] for i in some), self.block(some)
            return

        def read(index: int) -> Tensor:
            image = self.image(index)
            return image if prepare is None else prepare(image)

        if self.threads and prepare is None and processes is None:
            processes = 0
        waiting: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        parts = (positions[start : start + size] for start in range(0, len(positions), size))
        for some, found in zip(
            parts, reading.groups(read, positions, size, processes=processes, pinned=pinned), strict=True
        ):
            ids = tuple(self.ids[i] for i in some)
            if isinstance(found, Tensor):  # all of one size
                yield ids, found
                continue
            for name, image in zip(ids, found, strict=True):
                group = waiting.setdefault(image.shape, [])
                group.append((name, image))
                if len(group) == size:
                    yield _stack(waiting.pop(image.shape))
        for group in waiting.values():
            yield _stack(group)

    def digest(self, within: Sequence[int] | None = None) -> str:
        """sha256 of what decides the pixels of the images at some positions, in that order."""
        total = hashlib.sha256()
        positions = range(len(self)) if within is None else within
        for one in ahead(lambda i: hashlib.sha256(self.content(i)).digest(), positions):
            total.update(one)
        return total.hexdigest()


def count_sizes(sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """How many of each, the most frequent first."""
    return dict(Counter(sizes).most_common())


def _stack(group: list[tuple[str, Tensor]]) -> tuple[tuple[str, ...], Tensor]:
    return tuple(name for name, _ in group), torch.stack([image for _, image in group])


def _nothing(name: str = "it") -> Any:
    raise DiffAccelError(f"'{name}' holds statistics and no images; this needs the images themselves.")

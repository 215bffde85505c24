"""The ``Source`` of images: a folder, a zip, an npz or a tensor, read in one stable order as uint8 RGB."""

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
from diffaccel.eval.images import prefetch
from diffaccel.eval.images.decode import Data

_OVERSHOOT = 1 / 255  # share of the declared range by which rounding in low precision may exceed it
Batch = tuple[tuple[str, ...], Tensor]  # ids, images (B, 3, H, W)


def to_uint8(x: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Convert images of any shape to 8 bits: ``round(255 clamp((x - low) / (high - low), 0, 1))``.

    All of the package converts here. Values are rounded, not truncated: every level k/255 survives float32, float16 and
    bfloat16, and the round trip through [-1, 1]. uint8 is returned unchanged.

    Raises:
        DiffAccelError: for another dtype, for values outside the declared range, and for values that are not finite.
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
        name: name of the set in reports.
        kind: "folder", "zip", "npz", "tensor", or "statistics" for an npz of a mean and covariance without images.
        ids: one for each image: the path without its suffix, or a running number.
        files: the file of each id, where there are files.
        sizes: number of images of each (height, width).
        warnings: warnings about the images that a report must print.
        path: where the images were read from.
        threads: whether reading an image lets other threads run, so that several threads can feed a GPU.
        image: position to uint8 ``(3, H, W)``.
        content: position to the bytes that determine the image's pixels.
        block: positions to images ``(B, 3, H, W)`` at once, where that is cheap.
    """

    name: str
    kind: str
    ids: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    path: Path | None = None
    threads: bool = False
    image: Callable[[int], Tensor] = field(default=lambda index: _refuse_statistics(), repr=False)
    content: Callable[[int], Data] = field(default=lambda index: _refuse_statistics(), repr=False)
    block: Callable[[Sequence[int]], Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def batches(
        self,
        size: int = 64,
        *,
        positions: Sequence[int] | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        processes: int | None = None,
        pinned: bool = False,
    ) -> Iterator[Batch]:
        """Yield ids and images ``(B, 3, H, W)`` with ``B <= size``, read ahead.

        A batch holds images of one size. With several sizes, batches come in another order than ids: the ids tell.

        Args:
            size: maximum number of images in a batch.
            positions: the images to read, in that order; all by default.
            prepare: applied to each image ``(3, H, W)`` where it was read.
            processes: number of reading processes; by default threads, or processes for many images on many cores.
            pinned: return images in page-locked memory, from which a GPU copies while it computes.

        Raises:
            DiffAccelError: for a source of statistics, and for an image that cannot be read, naming it.
        """
        if self.kind == "statistics":
            _refuse_statistics(self.name)
        if size < 1:
            raise DiffAccelError(f"A batch holds at least 1 image; got batch size {size}.")
        positions = range(len(self)) if positions is None else positions
        parts = [positions[start : start + size] for start in range(0, len(positions), size)]
        ids = (tuple(self.ids[i] for i in part) for part in parts)
        if self.block is not None and prepare is None:
            yield from zip(ids, map(self.block, parts), strict=True)
            return

        def read(index: int) -> Tensor:
            image = self.image(index)
            return image if prepare is None else prepare(image)

        if self.threads and prepare is None and processes is None:
            processes = 0
        images = prefetch.map_batches(read, positions, size, processes=processes, pinned=pinned)
        yield from _split_by_shape(zip(ids, images, strict=True), size)

    def digest(self, positions: Sequence[int] | None = None) -> str:
        """Return the sha256 of the bytes that determine the pixels at ``positions`` (default all), in that order."""
        total = hashlib.sha256()
        positions = range(len(self)) if positions is None else positions
        for digest in prefetch.ahead(lambda i: hashlib.sha256(self.content(i)).digest(), positions):
            total.update(digest)
        return total.hexdigest()


def count_sizes(sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Count the images of each size, the most frequent size first."""
    return dict(Counter(sizes).most_common())


def _split_by_shape(batches: Iterable[tuple[tuple[str, ...], Tensor | list[Tensor]]], size: int) -> Iterator[Batch]:
    """Pass stacked batches on; regroup lists of unequal images into batches of one shape, ``size`` at most."""
    groups: dict[torch.Size, list[tuple[str, Tensor]]] = {}
    for ids, images in batches:
        if isinstance(images, Tensor):
            yield ids, images
            continue
        for name, image in zip(ids, images, strict=True):
            group = groups.setdefault(image.shape, [])
            group.append((name, image))
            if len(group) == size:
                yield _stack(groups.pop(image.shape))
    for group in groups.values():
        yield _stack(group)


def _stack(group: list[tuple[str, Tensor]]) -> Batch:
    return tuple(name for name, _ in group), torch.stack([image for _, image in group])


def _refuse_statistics(name: str = "it") -> Any:
    raise DiffAccelError(f"'{name}' holds statistics and no images; this needs the images themselves.")

"""Features of a set of images: extracted once, in the order of ids, kept in a cache that survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.files import read_tensor, write_tensor

FORMAT = 1
CHUNK = 1024  # images in a file of the cache: what a kill may lose
_IN_FLIGHT = 2  # batches the device may be behind, so that it does not wait for their way to the CPU
_SAME = 1e-3  # how far, relative to the largest, features of one image may be apart when batches differ


@dataclass
class Features:
    """Features of images, a row for each.

    Attributes:
        values: ``(n, d)`` float32 on the CPU.
        ids: of the images, one for each row.
        extractor: its name.
        key: what a report calls the Fréchet distance of these features.
        weights_sha256: of the extractor's weights.
        protocol: its preprocessing.
        official: whether its weights are the published ones.
        source: the name of the images.
        warnings: what a report must say about the images.
    """

    values: Tensor
    ids: tuple[str, ...]
    extractor: str
    key: str
    weights_sha256: str = ""
    protocol: str = "own"
    official: bool = False
    source: str = ""
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Sequence[str]) -> Tensor:
        """The rows of some ids, in their order.

        Raises:
            DiffAccelError: for an id that is not among them.
        """
        place = {name: i for i, name in enumerate(self.ids)}
        if lacking := next((name for name in ids if name not in place), None):
            raise DiffAccelError(f"'{self.source}' has no image with the id '{lacking}'. Pair sets of the same ids.")
        return self.values[[place[name] for name in ids]]


def extract(
    source: Source,
    extractor: Extractor,
    *,
    batch: int = 64,
    progress: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Features:
    """Features of every image of ``source``.

    Images are read, and prepared where that is done on the CPU, in threads ahead of the network. The network runs in
    float32 without TF32 and without autocast.

    Args:
        source: from :func:`diffaccel.eval.images.source.open_source`.
        extractor: from :func:`diffaccel.eval.networks.extractors.extractor`.
        batch: images at once; it does not change the features beyond rounding.
        progress: show a bar on stderr.
        cache: a folder that keeps features by the content of the images and by the extractor. What was extracted for
            the same 1024 images in a row is not extracted again, even where the run before was killed.

    Raises:
        DiffAccelError: for statistics instead of images, an image that cannot be read, and features that are not
            finite, with how many and the first id.
    """
    if source.kind == "statistics":
        raise DiffAccelError(f"'{source.name}' holds statistics and no images, so it has no features to extract.")
    values = torch.empty(len(source), extractor.dim)
    files = _Chunks(source, extractor, Path(cache).expanduser() if cache is not None else None)
    missing = files.read(values)
    place = {name: i for i, name in enumerate(source.ids)}
    pending: deque[tuple[tuple[str, ...], Callable[[], Tensor]]] = deque()

    def settle() -> int:
        ids, arrived = pending.popleft()
        found = arrived()
        _check(found, ids, extractor.name)
        rows = [place[name] for name in ids]
        values[rows] = found
        files.done(rows, values)
        return len(ids)

    from tqdm import tqdm

    with tqdm(total=len(source), initial=len(source) - len(missing), unit="image", disable=not progress) as bar:
        pinned = extractor.device.type == "cuda"
        for ids, images in source.batches(batch, within=missing, prepare=extractor.prepare, pinned=pinned):
            pending.append((ids, _sent(extractor.features(images))))
            if len(pending) > _IN_FLIGHT:
                bar.update(settle())
        while pending:
            bar.update(settle())
    return Features(
        values=values, ids=source.ids, extractor=extractor.name, key=extractor.key, protocol=extractor.protocol,
        weights_sha256=extractor.weights_sha256, official=extractor.official, source=source.name,
        warnings=list(source.warnings),
    )  # fmt: skip


def merge(parts: Sequence[Features], *, num: int | None = None) -> Features:
    """Features from several processes as one set in the order of ids.

    A sampler that pads the last batch gives some images to two processes; the first copy stays.

    Raises:
        DiffAccelError: for features of different extractors, for two images with one id that differ, and for another
            count of images than ``num``.
    """
    if not parts:
        raise DiffAccelError("There are no features to merge.")
    first = parts[0]
    for part in parts:
        if (part.key, part.weights_sha256) != (first.key, first.weights_sha256):
            raise DiffAccelError(f"Features of '{first.key}' and of '{part.key}' cannot be merged. Extract them alike.")
    scale = max((float(part.values.abs().max()) for part in parts if len(part)), default=0.0)
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, row in zip(part.ids, part.values, strict=True):
            known = found.setdefault(name, row)
            if known is not row and float((known - row).abs().max()) > _SAME * scale:
                raise DiffAccelError(f"Two different images have the id '{name}'. Ids must be unique: rename one.")
    if num is not None and len(found) != num:
        raise DiffAccelError(
            f"The parts hold {len(found)} different images, but {num} were expected. One is incomplete."
        )
    ids = tuple(sorted(found))
    warnings = list(dict.fromkeys(warning for part in parts for warning in part.warnings))
    values = torch.stack([found[name] for name in ids]) if ids else first.values
    return Features(
        values=values, ids=ids, extractor=first.extractor, key=first.key, protocol=first.protocol,
        weights_sha256=first.weights_sha256, official=first.official, source=first.source, warnings=warnings,
    )  # fmt: skip


class _Chunks:
    """Files of features, each named by the images and the extractor that it is of."""

    def __init__(self, source: Source, extractor: Extractor, folder: Path | None) -> None:
        self.files: list[Path] = []
        self.left: list[int] = []  # rows that each file still waits for
        if folder is None:
            return
        about = [FORMAT, extractor.name, extractor.key, extractor.protocol, extractor.weights_sha256, extractor.dim]
        folder.mkdir(parents=True, exist_ok=True)
        for rows in self._all(len(source)):
            text = json.dumps([*about, source.digest(rows)])
            self.files.append(folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors")
            self.left.append(len(rows))

    @staticmethod
    def _all(n: int) -> list[range]:
        return [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]

    def read(self, values: Tensor) -> Sequence[int]:
        """Fill in the rows that are known, and return the others."""
        if not self.files:
            return range(len(values))
        missing: list[int] = []
        for rows, file in zip(self._all(len(values)), self.files, strict=True):
            try:
                known = read_tensor(file)
                values[rows.start : rows.stop] = known
            except (OSError, SafetensorError, KeyError, RuntimeError):  # not there, or damaged: made again
                missing += rows
        return missing

    def done(self, rows: Sequence[int], values: Tensor) -> None:
        """Write the chunks that these rows complete."""
        for row in rows if self.files else ():
            chunk = row // CHUNK
            self.left[chunk] -= 1
            if self.left[chunk] == 0:
                write_tensor(self.files[chunk], values[chunk * CHUNK : (chunk + 1) * CHUNK].clone())


def _sent(found: Tensor) -> Callable[[], Tensor]:
    """Start the way to the CPU, behind this batch and not behind later ones; what is returned waits for its end."""
    if found.device.type != "cuda":
        return found.cpu
    copy = found.to("cpu", non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(found.device))

    def wait() -> Tensor:
        arrival.synchronize()
        return copy

    return wait


def _check(found: Tensor, ids: Sequence[str], name: str) -> None:
    bad = ~torch.isfinite(found).all(1)
    if bool(bad.any()):
        first = ids[int(bad.nonzero()[0])]
        raise DiffAccelError(
            f"The extractor '{name}' returned features that are not finite for {int(bad.sum())} of {len(ids)} images, "
            f"the first '{first}'. Look at that image and at the weights."
        )

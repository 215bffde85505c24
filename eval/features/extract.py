"""Extract the features of a set of images in the order of ids, with a cache that survives interruptions."""

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
from diffaccel.eval.images.names import natural
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.files import read_tensor, write_tensor

FORMAT = 1
CHUNK = 1024  # images per file of the cache: at most so many are lost by an interruption
_IN_FLIGHT = 2  # batches queued on the device, so that it does not wait for copies to the CPU
_TOLERANCE = 1e-3  # difference of one image's features between batches, relative to the largest feature


@dataclass
class Features:
    """Features of images, one row per image.

    Attributes:
        values: ``(n, d)`` float32 on the CPU.
        ids: ids of the images, one per row.
        extractor: name of the extractor.
        key: name of the Fréchet distance of these features in reports.
        weights_sha256: digest of the extractor's weights.
        protocol: protocol of the extractor's preprocessing.
        official: whether the extractor's weights are the published ones.
        source: name of the set of images.
        warnings: warnings about the images that a report must print.
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
        """Return the rows of ``ids``, in their order.

        Raises:
            DiffAccelError: for an id that is not among them.
        """
        row = {name: i for i, name in enumerate(self.ids)}
        if missing := next((name for name in ids if name not in row), None):
            raise DiffAccelError(f"'{self.source}' has no image with the id '{missing}'. Pair sets of the same ids.")
        return self.values[[row[name] for name in ids]]


def extract(
    source: Source,
    extractor: Extractor,
    *,
    batch: int = 64,
    progress: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Features:
    """Extract the features of every image of ``source``.

    Images are read, and prepared on the CPU where the extractor does so, ahead of the network. The network runs in
    float32 without TF32 and without autocast.

    Args:
        source: from :func:`diffaccel.eval.images.open.open_source`.
        extractor: from :func:`diffaccel.eval.networks.extractors.extractor`.
        batch: images per forward pass; it does not change the features beyond rounding.
        progress: show a progress bar on stderr.
        cache: a folder that caches features by the content of the images and by the extractor. Complete chunks of 1024
            consecutive images are not extracted again, even after an interruption.

    Raises:
        DiffAccelError: for statistics instead of images, an image that cannot be read, and features that are not
            finite, with their number and the first id.
    """
    if source.kind == "statistics":
        raise DiffAccelError(f"'{source.name}' holds statistics and no images, so it has no features to extract.")
    values = torch.empty(len(source), extractor.dim)
    chunks = _CachedChunks(source, extractor, Path(cache).expanduser() if cache is not None else None)
    missing = chunks.read(values)
    row = {name: i for i, name in enumerate(source.ids)}
    pending: deque[tuple[tuple[str, ...], Callable[[], Tensor]]] = deque()

    def store_oldest() -> int:
        ids, wait = pending.popleft()
        features = wait()
        _check_finite(features, ids, extractor.name)
        rows = [row[name] for name in ids]
        values[rows] = features
        chunks.write_complete(rows, values)
        return len(ids)

    from tqdm import tqdm

    with tqdm(total=len(source), initial=len(source) - len(missing), unit="image", disable=not progress) as bar:
        pinned = extractor.device.type == "cuda"
        for ids, images in source.batches(batch, positions=missing, prepare=extractor.prepare, pinned=pinned):
            pending.append((ids, _copy_to_cpu(extractor.features(images))))
            if len(pending) > _IN_FLIGHT:
                bar.update(store_oldest())
        while pending:
            bar.update(store_oldest())
    return Features(
        values=values, ids=source.ids, extractor=extractor.name, key=extractor.key, protocol=extractor.protocol,
        weights_sha256=extractor.weights_sha256, official=extractor.official, source=source.name,
        warnings=list(source.warnings),
    )  # fmt: skip


def merge(parts: Sequence[Features], *, num: int | None = None) -> Features:
    """Merge features from several processes into one set in the order of ids.

    A sampler that pads the last batch gives some images to two processes; the first copy is kept.

    Raises:
        DiffAccelError: for features of different extractors, for different images with one id, and for another number
            of images than ``num``.
    """
    if not parts:
        raise DiffAccelError("There are no features to merge.")
    first = parts[0]
    for part in parts:
        if (part.key, part.weights_sha256) != (first.key, first.weights_sha256):
            raise DiffAccelError(f"Features of '{first.key}' and of '{part.key}' cannot be merged. Extract them alike.")
    scale = max((float(part.values.abs().max()) for part in parts if len(part)), default=0.0)
    rows: dict[str, Tensor] = {}
    for part in parts:
        for name, row in zip(part.ids, part.values, strict=True):
            first_copy = rows.setdefault(name, row)
            if first_copy is not row and float((first_copy - row).abs().max()) > _TOLERANCE * scale:
                raise DiffAccelError(f"Two different images have the id '{name}'. Ids must be unique: rename one.")
    if num is not None and len(rows) != num:
        raise DiffAccelError(
            f"The parts hold {len(rows)} different images, but {num} were expected. One is incomplete."
        )
    ids = tuple(sorted(rows, key=natural))
    warnings = list(dict.fromkeys(warning for part in parts for warning in part.warnings))
    values = torch.stack([rows[name] for name in ids]) if ids else first.values
    return Features(
        values=values, ids=ids, extractor=first.extractor, key=first.key, protocol=first.protocol,
        weights_sha256=first.weights_sha256, official=first.official, source=first.source, warnings=warnings,
    )  # fmt: skip


class _CachedChunks:
    """Cache of features in files of consecutive images, named by a digest of the images and the extractor.

    Attributes:
        files: the file of each chunk; empty without a cache.
        remaining: number of rows that each chunk still waits for.
    """

    def __init__(self, source: Source, extractor: Extractor, folder: Path | None) -> None:
        self.files: list[Path] = []
        self.remaining: list[int] = []
        if folder is None:
            return
        identity = [FORMAT, extractor.name, extractor.key, extractor.protocol, extractor.weights_sha256, extractor.dim]
        folder.mkdir(parents=True, exist_ok=True)
        for rows in self._chunks(len(source)):
            text = json.dumps([*identity, source.digest(rows)])
            self.files.append(folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors")
            self.remaining.append(len(rows))

    @staticmethod
    def _chunks(n: int) -> list[range]:
        return [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]

    def read(self, values: Tensor) -> Sequence[int]:
        """Fill in the cached rows of ``values``, and return the others."""
        if not self.files:
            return range(len(values))
        missing: list[int] = []
        for rows, file in zip(self._chunks(len(values)), self.files, strict=True):
            try:
                values[rows.start : rows.stop] = read_tensor(file)
            except (OSError, SafetensorError, KeyError, RuntimeError):  # missing or damaged: extracted again
                missing += rows
        return missing

    def write_complete(self, rows: Sequence[int], values: Tensor) -> None:
        """Write the chunks that are complete with these rows."""
        for row in rows if self.files else ():
            chunk = row // CHUNK
            self.remaining[chunk] -= 1
            if self.remaining[chunk] == 0:
                write_tensor(self.files[chunk], values[chunk * CHUNK : (chunk + 1) * CHUNK].clone())


def _copy_to_cpu(features: Tensor) -> Callable[[], Tensor]:
    """Queue a copy to the CPU behind this batch, ahead of later ones; the returned function waits for it."""
    if features.device.type != "cuda":
        return features.cpu
    copy = features.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(features.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def _check_finite(features: Tensor, ids: Sequence[str], name: str) -> None:
    bad = ~torch.isfinite(features).all(1)
    if bool(bad.any()):
        first = ids[int(bad.nonzero()[0])]
        raise DiffAccelError(
            f"The extractor '{name}' returned features that are not finite for {int(bad.sum())} of {len(ids)} images, "
            f"the first '{first}'. Look at that image and at the weights."
        )

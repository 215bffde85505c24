"""Features of a source's pictures in the order of its ids, kept so that a second report costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.extractors.base import Extractor
from diffaccel.eval.images import Source
from diffaccel.record import atomic


@dataclass(frozen=True)
class Features:
    """Features of pictures.

    Attributes:
        values: (n, d) float32, on the CPU.
        ids: of the rows.
    """

    values: Tensor
    ids: tuple[str, ...]

    def rows(self, ids: list[str]) -> Tensor:
        """The rows of some ids, in their order."""
        place = {image: i for i, image in enumerate(self.ids)}
        return self.values[[place[image] for image in ids]]


def extract(source: Source, extractor: Extractor, *, batch: int = 64, cache: Path | None = None) -> Features:
    """Features of every picture.

    Args:
        source: the pictures.
        extractor: the network; each row depends on its own picture alone.
        batch: pictures in one call.
        cache: a folder for the result, named after the pictures' bytes and the network.

    Raises:
        DiffAccelError: for features that are not finite, naming the first picture.
    """
    from safetensors.torch import load_file, save

    key = f"{extractor.name}-{extractor.weights_sha256[:12]}-{source.digest()[:16]}-{len(source)}"
    file = None if cache is None else cache / f"{key.replace('/', '-')}.safetensors"
    if file is not None and file.is_file():
        return Features(load_file(file)["features"], source.ids)
    values = torch.empty(len(source), extractor.dim)
    place = {image: i for i, image in enumerate(source.ids)}
    for ids, images in source.batches(batch, prepare=extractor.prepare):
        found = extractor.features(images).cpu()
        values[[place[image] for image in ids]] = found
        if not (finite := torch.isfinite(found).all(1)).all():
            first = ids[int((~finite).nonzero()[0])]
            raise DiffAccelError(
                f"'{extractor.name}' gave features that are not finite for {int((~finite).sum())} pictures, the first "
                f"'{first}'. Look at its weights."
            )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as out:
            out.write(save({"features": values}))
    return Features(values, source.ids)

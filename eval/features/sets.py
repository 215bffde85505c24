"""One side of a distance between sets: the features of its images, or what a file keeps of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.features import statistics_files as feature_statistics
from diffaccel.eval.features.extract import extract
from diffaccel.eval.features.statistics_files import StatisticsFile
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.inception import TAPS, InceptionExtractor

_INCEPTION = "inception"
_PICKLED = {"fid": _INCEPTION, "fd_dinov2": "dinov2"}  # EDM2's entries, and how the names of their networks start


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A set of images as a network sees it.

    Attributes:
        name: of the images, as reports call them.
        n: how many; None where a file of statistics does not tell.
        main: features ``(n, d)`` of the images, or their moments.
        spatial: the same of the features for sFID, where they are wanted and known.
        warnings: what a report must say about them.
    """

    name: str
    n: int | None
    main: Tensor | Moments
    spatial: Tensor | Moments | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def features(self) -> Tensor:
        """Features of the images themselves.

        Raises:
            DiffAccelError: for a set of which only statistics are known.
        """
        if isinstance(self.main, Moments):
            _needs_images(self.name)
        return self.main


def load(
    path: str | os.PathLike[str],
    extractor: Extractor,
    *,
    spatial: bool = False,
    statistics: bool = True,
    least: int = 2,
    num: int | None = None,
    **extraction: Any,
) -> FeatureSet:
    """The set in a folder, zip or npz of images, in a file of statistics, or in clean-fid's file of features.

    An npz that holds both images and statistics, such as ADM's references, stands for its statistics where Inception
    is asked for, which is how its authors use it, and for its images otherwise.

    Args:
        path: of the set.
        extractor: of the features.
        spatial: whether the features for sFID are wanted too; the extractor is then Inception.
        statistics: whether a mean and a covariance are enough.
        least: how many images are needed.
        num: only the first images, in the order of ids. Files of statistics are taken whole.
        extraction: batch, progress and cache of :func:`diffaccel.eval.features.extract.extract`.

    Raises:
        DiffAccelError: for what cannot be read, too few images, and statistics of another network or protocol.
    """
    file = Path(path).expanduser()
    held = feature_statistics.arrays(file)
    known = {"mu", "sigma"} <= held
    images = "arr_0" in held
    if known and not images and not statistics:
        _needs_images(file.stem)
    if known and statistics and (not images or extractor.name.startswith(_INCEPTION)):
        return _of_statistics(file, extractor)
    if "feats" in held and not images:
        return _of_features(file, extractor)
    source = open_source(path, num=num)
    if len(source) < least:
        raise DiffAccelError(
            f"'{path}' holds {len(source)} image{'s' * (len(source) > 1)}, and at least {least} are needed. Add images."
        )
    if spatial and isinstance(extractor, InceptionExtractor):
        found = _on(extractor, extract(source, extractor.at("both"), **extraction).values)
        main, more = found[:, : extractor.dim], found[:, extractor.dim :]
    else:
        main, more = _on(extractor, extract(source, extractor, **extraction).values), None
    return FeatureSet(source.name, len(source), main, more, list(source.warnings))


def check_counts(sets: Sequence[FeatureSet], *, mixed: bool) -> None:
    """Refuse sets of different numbers of images in one table: the bias of most distances depends on the number.

    Raises:
        DiffAccelError: unless ``mixed`` allows it.
    """
    if len({one.n for one in sets}) > 1 and not mixed:
        named = ", ".join(f"'{one.name}' {one.n or 'an unknown number'}" for one in sets)
        raise DiffAccelError(
            f"The sets hold different numbers of images ({named}), and their distances do not compare. Cut them to one "
            "number with --num, or say --allow-mixed-n."
        )


def _on(extractor: Extractor, values: Tensor) -> Tensor:
    """Where the numerics run: on the network's GPU, since other devices lack float64."""
    return values.to(extractor.device) if extractor.device.type == "cuda" else values


def _of_statistics(file: Path, extractor: Extractor) -> FeatureSet:
    entry = next((key for key, network in _PICKLED.items() if extractor.name.startswith(network)), None)
    found = feature_statistics.read(file, dim=extractor.dim, metric=entry if file.suffix.lower() == ".pkl" else None)
    if found.weights_sha256 not in (None, extractor.weights_sha256):
        raise DiffAccelError(
            f"'{file}' holds statistics of '{found.feature_name}', another network than '{extractor.name}'. "
            "Give its --extractor, or make the statistics again with diffaccel eval stats."
        )
    if found.protocol is not None and not protocols.alike(found.protocol, extractor.protocol):
        raise DiffAccelError(
            f"'{file}' holds statistics of the protocol '{found.protocol}', and the images go through "
            f"'{extractor.protocol}'. Give --protocol {found.protocol}, or make the statistics again."
        )
    more, wanted = found.spatial, TAPS["spatial"].dim
    if more is not None and more.dim != wanted:
        raise DiffAccelError(f"'{file}' has {more.dim} spatial features, sFID takes {wanted}. Is it of ADM?")
    return FeatureSet(file.stem, found.moments.n, found.moments, more, _assumed(file, found, extractor))


def _assumed(file: Path, found: StatisticsFile, extractor: Extractor) -> list[str]:
    if not found.assumed:
        return []
    named = {"n": "number of images", "feature_name": "network", "weights_sha256": "weights"}
    lacking = ", ".join(named.get(name, name) for name in found.assumed)
    return [f"'{file}' does not say its {lacking}: assumed to be of {extractor.name}, protocol {extractor.protocol}."]


def _of_features(file: Path, extractor: Extractor) -> FeatureSet:
    features = feature_statistics.read_features(file)
    if features.shape[1] != extractor.dim:
        raise DiffAccelError(
            f"'{file}' is of {features.shape[1]} features, the extractor gives {extractor.dim}. Use the file of it."
        )
    said = f"'{file}' does not say its network: assumed to be of {extractor.name}, protocol {extractor.protocol}."
    return FeatureSet(file.stem, len(features), _on(extractor, features), warnings=[said])


def _needs_images(name: str) -> NoReturn:
    raise DiffAccelError(
        f"'{name}' holds statistics. This needs the images of both sets, not statistics: give folders, zips or npz of "
        "images."
    )

"""Load one side of a distance between sets: the features of its images, or their statistics from a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.features import statistics_files
from diffaccel.eval.features.extract import extract
from diffaccel.eval.features.statistics_files import StatisticsFile
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.inception import TAPS, InceptionExtractor

_INCEPTION = "inception"
_EDM2_ENTRIES = {"fid": _INCEPTION, "fd_dinov2": "dinov2"}  # entry of the file: prefix of the network's name


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features or moments of a set of images.

    Attributes:
        name: name of the set in reports.
        n: number of images; None where a file of statistics does not give it.
        main: features ``(n, d)`` of the images, or their moments.
        spatial: features or moments for sFID, where requested and available.
        warnings: warnings about the set that a report must print.
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
            DiffAccelError: for a set that has only statistics.
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
    """Load the set in a folder, zip or npz of images, in a file of statistics, or in clean-fid's file of features.

    An npz that holds both images and statistics, such as ADM's references, is read as statistics for Inception, which
    is how its authors use it, and as images for other extractors.

    Args:
        path: the folder or file of the set.
        extractor: extractor of the features.
        spatial: whether to extract the features for sFID too; the extractor is then Inception.
        statistics: whether a mean and a covariance are enough.
        least: minimum number of images.
        num: use only the first images, in the order of ids. Files of statistics are used whole.
        extraction: batch, progress and cache of :func:`diffaccel.eval.features.extract.extract`.

    Raises:
        DiffAccelError: for files that cannot be read, too few images, and statistics of another network or protocol.
    """
    file = Path(path).expanduser()
    arrays = statistics_files.arrays(file)
    has_statistics, has_images = {"mu", "sigma"} <= arrays, "arr_0" in arrays
    if has_statistics and not has_images and not statistics:
        _needs_images(file.stem)
    if has_statistics and statistics and (not has_images or extractor.name.startswith(_INCEPTION)):
        return _load_statistics(file, extractor)
    if "feats" in arrays and not has_images:
        return _load_features(file, extractor)
    source = open_source(path, num=num)
    if len(source) < least:
        raise DiffAccelError(
            f"'{path}' holds {len(source)} image{'s' * (len(source) > 1)}, and at least {least} are needed. Add images."
        )
    if spatial and isinstance(extractor, InceptionExtractor):
        both = _to_metric_device(extractor, extract(source, extractor.at("both"), **extraction).values)
        main, for_sfid = both[:, : extractor.dim], both[:, extractor.dim :]
    else:
        main, for_sfid = _to_metric_device(extractor, extract(source, extractor, **extraction).values), None
    return FeatureSet(source.name, len(source), main, for_sfid, list(source.warnings))


def check_counts(sets: Sequence[FeatureSet], *, mixed: bool) -> None:
    """Refuse sets of different numbers of images in one table: the bias of most distances depends on that number.

    Raises:
        DiffAccelError: unless ``mixed`` allows it.
    """
    if len({features.n for features in sets}) > 1 and not mixed:
        counts = ", ".join(f"'{features.name}' {features.n or 'an unknown number'}" for features in sets)
        raise DiffAccelError(
            f"The sets hold different numbers of images ({counts}), and their distances do not compare. Cut them to "
            "one number with --num, or say --allow-mixed-n."
        )


def _to_metric_device(extractor: Extractor, values: Tensor) -> Tensor:
    """Move features to the device of the metrics: the extractor's GPU if it has one, else the CPU."""
    return values.to(extractor.device) if extractor.device.type == "cuda" else values


def _load_statistics(file: Path, extractor: Extractor) -> FeatureSet:
    """Load a file of statistics, and refuse statistics of another network or protocol."""
    entry = next((key for key, network in _EDM2_ENTRIES.items() if extractor.name.startswith(network)), None)
    statistics = statistics_files.read(file, dim=extractor.dim, metric=entry if file.suffix.lower() == ".pkl" else None)
    if statistics.weights_sha256 not in (None, extractor.weights_sha256):
        raise DiffAccelError(
            f"'{file}' holds statistics of '{statistics.feature_name}', another network than '{extractor.name}'. "
            "Give its --extractor, or make the statistics again with diffaccel eval stats."
        )
    if statistics.protocol is not None and not protocols.alike(statistics.protocol, extractor.protocol):
        raise DiffAccelError(
            f"'{file}' holds statistics of the protocol '{statistics.protocol}', and the images go through "
            f"'{extractor.protocol}'. Give --protocol {statistics.protocol}, or make the statistics again."
        )
    spatial, spatial_dim = statistics.spatial, TAPS["spatial"].dim
    if spatial is not None and spatial.dim != spatial_dim:
        raise DiffAccelError(f"'{file}' has {spatial.dim} spatial features, sFID takes {spatial_dim}. Is it of ADM?")
    warnings = _assumption_warnings(file, statistics, extractor)
    return FeatureSet(file.stem, statistics.moments.n, statistics.moments, spatial, warnings)


def _assumption_warnings(file: Path, statistics: StatisticsFile, extractor: Extractor) -> list[str]:
    """Warn of properties that a file of statistics does not state."""
    if not statistics.assumed:
        return []
    descriptions = {"n": "number of images", "feature_name": "network", "weights_sha256": "weights"}
    unstated = ", ".join(descriptions.get(name, name) for name in statistics.assumed)
    return [f"'{file}' does not say its {unstated}: assumed to be of {extractor.name}, protocol {extractor.protocol}."]


def _load_features(file: Path, extractor: Extractor) -> FeatureSet:
    """Load clean-fid's file of features."""
    features = statistics_files.read_features(file)
    if features.shape[1] != extractor.dim:
        raise DiffAccelError(
            f"'{file}' is of {features.shape[1]} features, the extractor gives {extractor.dim}. Use the file of it."
        )
    warning = f"'{file}' does not say its network: assumed to be of {extractor.name}, protocol {extractor.protocol}."
    return FeatureSet(file.stem, len(features), _to_metric_device(extractor, features), warnings=[warning])


def _needs_images(name: str) -> NoReturn:
    raise DiffAccelError(
        f"'{name}' holds statistics. This needs the images of both sets, not statistics: give folders, zips or npz of "
        "images."
    )

"""Metrics of sets of images as rows: a function for every statistic that a protocol can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.distances import covered_estimate
from diffaccel.eval.comparison.printed_distances import FD, THOUSAND, feature_row, fid, kid, printed_key, thousandfold
from diffaccel.eval.comparison.row import Estimate, Family, Row, missing
from diffaccel.eval.features.sets import FeatureSet
from diffaccel.eval.metrics import frechet_intervals, inception_score, manifold_intervals, mmd, mmd_intervals
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.metrics.manifold_intervals import CoveredShare
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.inception import InceptionExtractor
from diffaccel.eval.networks.protocols import Metric, Protocol
from diffaccel.eval.uncertainty.influence import LEAST_ROWS
from diffaccel.eval.uncertainty.intervals import Interval

FAMILY: Family = "distribution"
_NO_REFERENCE = "A distance needs a reference set. Give one."


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """Network, protocol and options of the metrics of a set.

    Attributes:
        extractor: network of the features.
        spatial: network of the spatial features for sFID, where the protocol has it.
        protocol: None for the network's own preprocessing and the papers' parameters.
        interval: whether Fréchet distances get their interval.
        infinity: whether they are also extrapolated to infinitely many images.
    """

    extractor: Extractor
    spatial: Extractor | None = None
    protocol: Protocol | None = None
    interval: bool = True
    infinity: bool = False


def measure(
    metrics: Sequence[Metric], samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings
) -> tuple[list[Row], list[str]]:
    """Measure one set against a reference, or by itself for the Inception Score; return its rows, and warnings.

    Raises:
        DiffAccelError: for statistics where images are needed, and sets that are too small.
    """
    rows = [row for metric in metrics for row in _ROWS[metric.function](metric, samples, reference, settings)]
    extractor, m = settings.extractor, None if reference is None else reference.n
    detail = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256, "protocol": extractor.protocol}
    if settings.protocol is not None:
        detail["protocol"] = settings.protocol.name
    if reference is not None:
        detail["reference"] = reference.name
    rows = [replace(row, n=samples.n, m=m, detail=detail | row.detail) for row in rows]
    row_warnings = [str(row.detail["warning"]) for row in rows if row.detail.get("warning")]
    return rows, [*_count_warnings(metrics, samples, reference, settings), *row_warnings]


def _count_warnings(
    metrics: Sequence[Metric], samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings
) -> list[str]:
    """Return warnings about numbers of images: a singular covariance, and other counts than the protocol's."""
    warnings, n, protocol = [], samples.n, settings.protocol
    counts = [images.n for images in (samples, reference) if images is not None and images.n is not None]
    has_covariance = any(metric.function == protocols.FRECHET for metric in metrics)
    if has_covariance and counts and min(counts) <= settings.extractor.dim:
        warnings.append(f"{min(counts)} images give a singular covariance of {settings.extractor.dim} features.")
    if protocol is not None and n is not None and n != protocol.samples:
        warnings.append(
            f"The protocol {protocol.name} takes {protocol.samples} images and '{samples.name}' has {n}: not "
            "comparable with published numbers."
        )
    wanted = next((metric.reference for metric in metrics if metric.reference), None)
    if wanted is not None and reference is not None and reference.n not in (None, wanted):
        warnings.append(f"The protocol takes {wanted} reference images; '{reference.name}' has {reference.n}.")
    return warnings


def _row(
    metric: str, settings: MetricSettings, samples: FeatureSet, value: float | Interval | Estimate, **detail: Any
) -> Row:
    if isinstance(value, Estimate):
        estimate = replace(value, detail=detail | ({"from": value.note} if value.note else {}))
    elif isinstance(value, Interval):
        estimate = Estimate(value.value, value, detail=detail)
    else:
        estimate = Estimate(value, detail=detail)
    return feature_row(metric, samples.name, estimate, settings.extractor, n=samples.n, m=None, detail={})


def _both_features(samples: FeatureSet, reference: FeatureSet | None) -> tuple[Tensor, Tensor]:
    if reference is None:
        raise DiffAccelError(_NO_REFERENCE)
    return samples.features, reference.features


# -- Fréchet ----------------------------------------------------------------------------------------------------------


def _frechet(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> list[Row]:
    if reference is None:
        raise DiffAccelError(_NO_REFERENCE)
    spatial = metric.tap == "spatial"
    extractor = settings.spatial if spatial else settings.extractor
    if extractor is None:
        raise DiffAccelError(f"'{metric.name}' needs the extractor of spatial features.")
    x, y = (samples.spatial, reference.spatial) if spatial else (samples.main, reference.main)
    name = "sfid" if spatial else FD
    if x is None or y is None:
        lacking = samples.name if x is None else reference.name
        why = f"'{lacking}' holds no statistics of spatial features (mu_s, sigma_s)"
        return [missing(name, extractor.key, FAMILY, samples.name, "lower", why)]
    if settings.interval and not isinstance(x, Moments) and len(x) >= LEAST_ROWS:
        value: float | Interval = frechet_intervals.distance_interval(x, y)
    else:
        value = fid(x, y)[FD]
    row = _row(name, settings, samples, value)
    row.key = extractor.key
    rows = [row]
    if settings.infinity and not spatial:
        limit = frechet_intervals.infinity(samples.features, y)
        rows.append(
            _row("fd_infinity", settings, samples, limit.interval, r2=limit.r2, slope=limit.slope,
                 fit=limit.fit, sizes=list(limit.sizes), values=list(limit.values), warning=limit.warning)
        )  # fmt: skip
    return rows


# -- kernels ----------------------------------------------------------------------------------------------------------


def _kid(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> list[Row]:
    x, y = _both_features(samples, reference)
    if min(len(x), len(y)) < LEAST_ROWS:
        return [_row("kid", settings, samples, kid(x, y)["kid"])]
    return [_row("kid", settings, samples, thousandfold(mmd_intervals.kid_interval(x, y)))]


def _kid_subsets(
    metric: Metric, samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings
) -> list[Row]:
    x, y = _both_features(samples, reference)
    size, fewest = int(metric.parameters["size"]), min(len(x), len(y))
    if fewest < size and not metric.parameters.get("shrink"):
        why = f"subsets of {size} images cannot be drawn from {fewest}"
        key = printed_key("kid_subsets", settings.extractor)
        return [missing("kid_subsets", key, FAMILY, samples.name, "lower", why)]
    mean, std = mmd.kid_subsets(x, y, **metric.parameters)
    parameters = {"subsets": metric.parameters["subsets"], "size": min(size, fewest)}
    return [_row("kid_subsets", settings, samples, THOUSAND * mean, std=THOUSAND * std, **parameters)]


def _cmmd(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> list[Row]:
    x, y = _both_features(samples, reference)
    parameters = dict(metric.parameters)
    value = mmd_intervals.cmmd_interval(x, y, **parameters) if len(x) >= LEAST_ROWS else mmd.cmmd(x, y, **parameters)
    return [
        _row("cmmd", settings, samples, value, statistic="V", **parameters),
        _row(
            "cmmd_unbiased",
            settings,
            samples,
            mmd.cmmd_unbiased(x, y, **parameters),
            statistic="U",
            **parameters,
        ),
    ]


# -- neighbours and classes -------------------------------------------------------------------------------------------


def _precision_recall(
    metric: Metric, samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings
) -> list[Row]:
    x, y = _both_features(samples, reference)
    precision, recall = manifold_intervals.precision_recall_intervals(y, x, **metric.parameters)
    return _share_rows({"precision": precision, "recall": recall}, metric, samples, settings)


def _density_coverage(
    metric: Metric, samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings
) -> list[Row]:
    x, y = _both_features(samples, reference)
    density, coverage = manifold_intervals.density_coverage_intervals(y, x, **metric.parameters)
    return _share_rows({"density": density, "coverage": coverage}, metric, samples, settings)


def _share_rows(
    values: Mapping[str, Interval | CoveredShare], metric: Metric, samples: FeatureSet, settings: MetricSettings
) -> list[Row]:
    estimates = {
        name: covered_estimate(value) if isinstance(value, CoveredShare) else value for name, value in values.items()
    }
    return [_row(name, settings, samples, value, **metric.parameters) for name, value in estimates.items()]


def _inception_score(
    metric: Metric, samples: FeatureSet, reference: FeatureSet | None, settings: MetricSettings
) -> list[Row]:
    features = samples.features
    extractor = settings.extractor
    logits = extractor.logits(features.cpu()) if isinstance(extractor, InceptionExtractor) else features
    parameters = dict(metric.parameters)
    mean, std = inception_score.inception_score(logits, **parameters)
    return [_row("is", settings, samples, mean, std_over_splits=std, **parameters)]


_RowFunction = Callable[[Metric, FeatureSet, FeatureSet | None, MetricSettings], list[Row]]
_ROWS: dict[str, _RowFunction] = {
    protocols.FRECHET: _frechet,
    protocols.KID: _kid,
    protocols.KID_SUBSETS: _kid_subsets,
    protocols.CMMD: _cmmd,
    protocols.PRECISION_RECALL: _precision_recall,
    protocols.DENSITY_COVERAGE: _density_coverage,
    protocols.INCEPTION_SCORE: _inception_score,
}

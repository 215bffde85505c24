"""The metrics of sets of images as rows: a function for every statistic that a protocol can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import printed_distances as distances
from diffaccel.eval.comparison.row import Better, Family, Row, missing
from diffaccel.eval.features.sets import FeatureSet
from diffaccel.eval.metrics import frechet_intervals, inception_score, manifold, mmd
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.inception import InceptionExtractor
from diffaccel.eval.networks.protocols import Metric, Protocol
from diffaccel.eval.uncertainty.intervals import Interval

FAMILY: Family = "distribution"
_LONELY = "A distance needs a reference set. Give one."
THOUSAND = 1000  # what kernel distances are printed times


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and by which network.

    Attributes:
        extractor: of the features.
        spatial: of the features for sFID, where the protocol has it.
        protocol: None for the network's own preprocessing and the papers' parameters.
        interval: whether Fréchet distances get their interval, eleven times the work.
        infinity: whether they are also extrapolated to infinitely many images.
    """

    extractor: Extractor
    spatial: Extractor | None = None
    protocol: Protocol | None = None
    interval: bool = True
    infinity: bool = False


def measure(
    metrics: Sequence[Metric], samples: FeatureSet, reference: FeatureSet | None, setting: Setting
) -> tuple[list[Row], list[str]]:
    """The rows of one set against a reference, or by itself for the Inception Score; and what a reader must know.

    Raises:
        DiffAccelError: for statistics where images are needed, and sets that are too small.
    """
    rows = [row for metric in metrics for row in _MEASURED[metric.function](metric, samples, reference, setting)]
    extractor, m = setting.extractor, None if reference is None else reference.n
    about = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256, "protocol": extractor.protocol}
    if setting.protocol is not None:
        about["protocol"] = setting.protocol.name
    if reference is not None:
        about["reference"] = reference.name
    rows = [replace(row, n=samples.n, m=m, detail=about | row.detail) for row in rows]
    said = [str(row.detail["warning"]) for row in rows if row.detail.get("warning")]
    return rows, [*_cautions(metrics, samples, reference, setting), *said]


def _cautions(
    metrics: Sequence[Metric], samples: FeatureSet, reference: FeatureSet | None, setting: Setting
) -> list[str]:
    said, n = [], samples.n
    counts = [one.n for one in (samples, reference) if one is not None and one.n is not None]
    gaussian = any(metric.function == protocols.FRECHET for metric in metrics)
    if gaussian and counts and min(counts) <= setting.extractor.dim:
        said.append(f"{min(counts)} images give a singular covariance of {setting.extractor.dim} features.")
    chosen = setting.protocol
    if chosen is not None and n is not None and n != chosen.samples:
        said.append(
            f"The protocol {chosen.name} takes {chosen.samples} images and '{samples.name}' has {n}: not comparable "
            "with published numbers."
        )
    wanted = next((metric.reference for metric in metrics if metric.reference), None)
    if wanted is not None and reference is not None and reference.n not in (None, wanted):
        said.append(f"The protocol takes {wanted} reference images; '{reference.name}' has {reference.n}.")
    return said


def _row(
    metric: str, setting: Setting, samples: FeatureSet, value: float | Interval, better: Better, **detail: Any
) -> Row:
    interval = value if isinstance(value, Interval) else None
    number = value.value if isinstance(value, Interval) else value
    name = distances.key(metric, setting.extractor)
    return Row(
        metric=metric, key=name, family=FAMILY, run=samples.name, better=better, value=number, interval=interval,
        detail=detail,
    )  # fmt: skip


def _both(samples: FeatureSet, reference: FeatureSet | None) -> tuple[Tensor, Tensor]:
    if reference is None:
        raise DiffAccelError(_LONELY)
    return samples.features, reference.features


# -- Fréchet ----------------------------------------------------------------------------------------------------------


def _frechet(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, setting: Setting) -> list[Row]:
    if reference is None:
        raise DiffAccelError(_LONELY)
    spatial = metric.tap == "spatial"
    extractor = setting.spatial if spatial else setting.extractor
    if extractor is None:
        raise DiffAccelError(f"'{metric.name}' needs the extractor of spatial features.")
    x, y = (samples.spatial, reference.spatial) if spatial else (samples.main, reference.main)
    short = "sfid" if spatial else distances.FD
    if x is None or y is None:
        lacking = samples.name if x is None else reference.name
        why = f"'{lacking}' holds no statistics of spatial features (mu_s, sigma_s)"
        return [missing(short, extractor.key, FAMILY, samples.name, "lower", why)]
    if setting.interval and not isinstance(x, Moments) and len(x) >= 10 * frechet_intervals.SHARDS:
        value: float | Interval = frechet_intervals.distance_interval(x, y)
    else:
        value = distances.fid(x, y)[distances.FD]
    row = _row(short, setting, samples, value, "lower")
    row.key = extractor.key
    rows = [row]
    if setting.infinity and not spatial:
        found = frechet_intervals.infinity(samples.features, y)
        rows.append(
            _row("fd_infinity", setting, samples, found.interval, "lower", r2=found.r2, slope=found.slope,
                 fit=found.fit, sizes=list(found.sizes), values=list(found.values), warning=found.warning)
        )  # fmt: skip
    return rows


# -- kernels ----------------------------------------------------------------------------------------------------------


def _kid(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, setting: Setting) -> list[Row]:
    x, y = _both(samples, reference)
    if min(len(x), len(y)) < 3:
        return [_row("kid", setting, samples, distances.kid(x, y)["kid"], "lower")]
    return [_row("kid", setting, samples, _scaled(mmd.kid_interval(x, y)), "lower")]


def _kid_subsets(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, setting: Setting) -> list[Row]:
    x, y = _both(samples, reference)
    size, fewest = int(metric.parameters["size"]), min(len(x), len(y))
    if fewest < size and not metric.parameters.get("shrink"):
        why, name = f"subsets of {size} images cannot be drawn from {fewest}", "kid_subsets"
        return [missing(name, distances.key(name, setting.extractor), FAMILY, samples.name, "lower", why)]
    mean, std = mmd.kid_subsets(x, y, **metric.parameters)
    used = {"subsets": metric.parameters["subsets"], "size": min(size, fewest)}
    return [_row("kid_subsets", setting, samples, THOUSAND * mean, "lower", std=THOUSAND * std, **used)]


def _cmmd(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, setting: Setting) -> list[Row]:
    x, y = _both(samples, reference)
    used = dict(metric.parameters)
    return [
        _row("cmmd", setting, samples, mmd.cmmd(x, y, **used), "lower", statistic="V", **used),
        _row("cmmd_unbiased", setting, samples, mmd.cmmd_unbiased(x, y, **used), "lower", statistic="U", **used),
    ]


def _scaled(interval: Interval) -> Interval:
    values = {name: THOUSAND * getattr(interval, name) for name in ("value", "low", "high")}
    return replace(interval, **values)


# -- neighbours and classes -------------------------------------------------------------------------------------------


def _precision_recall(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, setting: Setting) -> list[Row]:
    x, y = _both(samples, reference)
    found = manifold.precision_recall(y, x, **metric.parameters)
    return _shares(("precision", "recall"), found, metric, samples, setting)


def _density_coverage(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, setting: Setting) -> list[Row]:
    x, y = _both(samples, reference)
    found = manifold.density_coverage(y, x, **metric.parameters)
    return _shares(("density", "coverage"), found, metric, samples, setting)


def _shares(
    names: tuple[str, str], found: tuple[float, float], metric: Metric, samples: FeatureSet, setting: Setting
) -> list[Row]:
    both = zip(names, found, strict=True)
    return [_row(name, setting, samples, value, "higher", **metric.parameters) for name, value in both]


def _score(metric: Metric, samples: FeatureSet, reference: FeatureSet | None, setting: Setting) -> list[Row]:
    features = samples.features
    extractor = setting.extractor
    logits = extractor.logits(features.cpu()) if isinstance(extractor, InceptionExtractor) else features
    used = dict(metric.parameters)
    mean, std = inception_score.inception_score(logits, **used)
    return [_row("is", setting, samples, mean, "higher", std_over_splits=std, **used)]


_Measured = Callable[[Metric, FeatureSet, FeatureSet | None, Setting], list[Row]]
_MEASURED: dict[str, _Measured] = {
    protocols.FRECHET: _frechet,
    protocols.KID: _kid,
    protocols.KID_SUBSETS: _kid_subsets,
    protocols.CMMD: _cmmd,
    protocols.PRECISION_RECALL: _precision_recall,
    protocols.DENSITY_COVERAGE: _density_coverage,
    protocols.INCEPTION_SCORE: _score,
}

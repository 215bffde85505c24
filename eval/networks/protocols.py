"""Named protocols: preprocessing, network and metrics as published together. Numbers of two do not compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffaccel.errors import DiffAccelError, unknown


def _constants(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType(values)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Metric of features, with its parameters.

    Attributes:
        name: name in papers; "FID" is printed only where the extractor's key says so.
        function: full name of the function that computes it.
        tap: tap of the network whose features it takes, where there are several.
        parameters: keyword arguments of the function.
        reference: number of reference images by convention, if it differs from the protocol's.
    """

    name: str
    function: str
    tap: str = "pool3"
    parameters: Mapping[str, Any] = field(default_factory=_constants)
    reference: int | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Preprocessing of images, network, and metrics of its features.

    Attributes:
        network: "inception", "dinov2", or "clip".
        preprocessing: its name in the network's extractor.
        metrics: metrics of the protocol, in the order of its tables.
        extractor: command-line spec of the network with its published weights.
        samples: number of images by convention; numbers at another count are not comparable.
        source: the paper.
        note: caveat for readers of its numbers.
    """

    name: str
    network: str
    preprocessing: str
    metrics: tuple[Metric, ...]
    extractor: str
    samples: int = 50_000
    source: str
    note: str = ""


FRECHET = "diffaccel.eval.metrics.frechet.distance"
KID = "diffaccel.eval.metrics.mmd.kid"
KID_SUBSETS = "diffaccel.eval.metrics.mmd.kid_subsets"
CMMD = "diffaccel.eval.metrics.mmd.cmmd"
INCEPTION_SCORE = "diffaccel.eval.metrics.inception_score.inception_score"
PRECISION_RECALL = "diffaccel.eval.metrics.manifold.precision_recall"
DENSITY_COVERAGE = "diffaccel.eval.metrics.manifold.density_coverage"
# functions that each command of `diffaccel eval` computes
COMMANDS = {
    "fid": (FRECHET,),
    "kid": (KID, KID_SUBSETS),
    "is": (INCEPTION_SCORE,),
    "prdc": (PRECISION_RECALL, DENSITY_COVERAGE),
    "cmmd": (CMMD,),
}

_FID = Metric(name="FID", function=FRECHET)
_SUBSETS = Metric(
    name="KID (subsets)", function=KID_SUBSETS, parameters=_constants(subsets=100, size=1000, seed=2020)
)  # fmt: skip
_SCORE = Metric(
    name="IS", function=INCEPTION_SCORE, tap="logits_unbiased", parameters=_constants(splits=10, shuffle_seed=2020)
)
_PRECISION_RECALL = Metric(name="precision, recall", function=PRECISION_RECALL, parameters=_constants(k=3))
_CMMD = Metric(name="CMMD", function=CMMD, tap="image", parameters=_constants(sigma=10.0, scale=1000.0))
_TF, _PUBLISHED = "tf1-bilinear-299", "inception"
CMMD_NETWORK, CMMD_HUB = "ViT-L-14-336", "timm/vit_large_patch14_clip_336.openai"

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="tf-fid", network="inception", preprocessing=_TF,
            metrics=(
                _FID, Metric(name="KID", function=KID), _SUBSETS, _SCORE, _PRECISION_RECALL,
            ),
            extractor=_PUBLISHED, source="arXiv 1706.08500",
            note="What torch-fidelity computes, up to rounding.",
        ),
        Protocol(
            name="pytorch-fid", network="inception", preprocessing="torch-bilinear-299", metrics=(_FID,),
            extractor=_PUBLISHED, source="arXiv 1706.08500",
            note="Scales to [-1, 1] and resizes with half-pixel centres; features differ from tf-fid's by a percent.",
        ),
        Protocol(
            name="clean-fid", network="inception", preprocessing="pil-bicubic-float-299",
            metrics=(
                _FID, Metric(name="KID (subsets)", function=KID_SUBSETS,
                             parameters=_constants(subsets=100, size=1000, shrink=True)),
            ),
            extractor="clean-inception", source="arXiv 2104.11222",
            note="Antialiased bicubic, not rounded.",
        ),
        Protocol(
            name="adm", network="inception", preprocessing=_TF,
            metrics=(
                _FID, Metric(name="sFID", function=FRECHET, tap="spatial"),
                Metric(name="IS", function=INCEPTION_SCORE, tap="logits_unbiased",
                       parameters=_constants(size=5000, shuffle_seed=None)),
                Metric(name="precision, recall", function=PRECISION_RECALL, parameters=_constants(k=3),
                       reference=10_000),
            ),
            extractor=_PUBLISHED, source="arXiv 2105.05233",
            note="The Inception Score takes contiguous splits of 5000. The tap of sFID is unverified.",
        ),
        Protocol(
            name="edm", network="inception", preprocessing=_TF, metrics=(_FID,),
            extractor=_PUBLISHED, source="arXiv 2206.00364",
            note="Published numbers are the lowest of three runs of 50000 seeds.",
        ),
        Protocol(
            name="dgm-dinov2", network="dinov2", preprocessing="pil-bicubic-224",
            metrics=(Metric(name="FD-DINOv2", function=FRECHET, tap="token"),),
            extractor="dinov2", source="arXiv 2306.04675",
            note="Pillow's bicubic, rounded to 8 bits.",
        ),
        Protocol(
            name="edm2-dinov2", network="dinov2", preprocessing="torch-bicubic-antialias-224",
            metrics=(Metric(name="FD-DINOv2", function=FRECHET, tap="token"),),
            extractor="dinov2", source="arXiv 2312.02696",
            note="PyTorch's antialiased bicubic, not rounded.",
        ),
        Protocol(
            name="cmmd", network="clip", preprocessing="torch-bicubic",
            metrics=(_CMMD,), extractor=f"open_clip:{CMMD_NETWORK}:openai", samples=30_000, source="arXiv 2401.09603",
            note="CLIP ViT-L/14 at 336 pixels; resized without keeping the aspect and without antialiasing.",
        ),
    )
})  # fmt: skip

DEFAULT = "tf-fid"
# metrics of any network without a protocol, with the parameters of their papers
OWN = (
    Metric(name="Fréchet distance", function=FRECHET),
    Metric(name="KID", function=KID),
    _SCORE,
    _PRECISION_RECALL,
    Metric(name="density, coverage", function=DENSITY_COVERAGE, parameters=_constants(k=5)),
    _CMMD,
)


def protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises:
        DiffAccelError: for an unknown name, with the nearest known one.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def alike(first: str, second: str) -> bool:
    """Check whether two protocols, or names such as "own", share network and preprocessing, hence features."""

    def pipeline(name: str) -> tuple[str, str]:
        protocol = PROTOCOLS.get(name)
        return (name, "") if protocol is None else (protocol.network, protocol.preprocessing)

    return pipeline(first) == pipeline(second)


def metrics(command: str, chosen: Protocol | None) -> tuple[Metric, ...]:
    """Return the metrics that one of :data:`COMMANDS` computes under a protocol, or without one.

    Raises:
        DiffAccelError: for a protocol without such a metric, naming those that have one.
    """

    def of_command(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        return tuple(metric for metric in metrics if metric.function in COMMANDS[command])

    selected = of_command(OWN if chosen is None else chosen.metrics)
    if not selected and chosen is not None:
        others = ", ".join(name for name, other in PROTOCOLS.items() if of_command(other.metrics))
        has = ", ".join(metric.name for metric in chosen.metrics)
        raise DiffAccelError(
            f"The protocol '{chosen.name}' has {has}, nothing for 'eval {command}'. Protocols that have: {others}."
        )
    return selected

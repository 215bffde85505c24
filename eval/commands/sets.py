"""``diffaccel eval fid``, ``kid``, ``is``, ``prdc``, ``cmmd`` and ``stats``: sets of images against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal
from diffaccel.errors import DiffAccelError
from diffaccel.eval.commands.options import (
    add_image_options,
    add_network_options,
    extraction_arguments,
    load_network,
    parse,
    write_json,
    write_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

    from diffaccel.eval.comparison.row import Row
    from diffaccel.eval.comparison.set_metrics import MetricSettings
    from diffaccel.eval.features.sets import FeatureSet
    from diffaccel.eval.metrics.frechet import Moments
    from diffaccel.eval.networks.extractors.base import Extractor
    from diffaccel.eval.networks.protocols import Metric, Protocol

COMMANDS = {
    "fid": "Fréchet distance of sets of images (or statistics), named after its network",
    "kid": "kernel distance of sets of images",
    "is": "Inception Score of sets of images",
    "prdc": "precision, recall, density and coverage of sets of images",
    "cmmd": "kernel distance in the image embeddings of a CLIP",
}
DEFAULT = {"is": "inception", "cmmd": "emoji-clip-judge"}  # networks; tiny for the others
_CLASSIFIERS = ("inception", "clean-inception", "py", "torchscript")
_EXAMPLES = {
    "fid": "diffaccel eval fid runs/base runs/dpm8 reference.npz --protocol adm --infinity",
    "is": "diffaccel eval is runs/base --extractor inception:/path/to/weights.pth",
    "cmmd": "diffaccel eval cmmd runs/base photos --protocol cmmd",
}


# -- fid, kid, is, prdc, cmmd -----------------------------------------------------------------------------------------


def run_distance(name: str, argv: list[str]) -> int:
    """Run one of :data:`COMMANDS` and return its exit status."""
    options = parse(_parser(name), argv)
    from diffaccel.eval.comparison.set_metrics import MetricSettings
    from diffaccel.eval.networks import protocols

    if name != "is" and len(options.sets) < 2:
        raise DiffAccelError(f"'eval {name}' compares sets with a reference, the last one. Give at least two.")
    protocol = protocols.protocol(options.protocol) if options.protocol else None
    metrics = protocols.metrics(name, protocol)
    extractor, protocol = _load_network(name, options)
    settings = MetricSettings(
        extractor=extractor, spatial=_spatial(extractor, metrics), protocol=protocol,
        interval=name == "fid" and options.interval, infinity=name == "fid" and options.infinity,
    )  # fmt: skip
    sets = _load_sets(options, settings, statistics=name == "fid")
    reference = None if name == "is" else sets.pop()
    rows, warnings = _measure(options, metrics, sets, reference, settings)
    if protocol is not None and protocol.name == "cmmd" and not extractor.name.startswith(protocols.CMMD_NETWORK):
        warnings.append(f"CMMD is published with {protocols.CMMD_NETWORK}; this is {extractor.name}.")
    write_rows(options, [name, *argv], rows, warnings)
    return 0


run_fid = partial(run_distance, "fid")
run_kid = partial(run_distance, "kid")
run_is = partial(run_distance, "is")
run_prdc = partial(run_distance, "prdc")
run_cmmd = partial(run_distance, "cmmd")


def _parser(name: str) -> terminal.Parser:
    text = COMMANDS[name]
    parser = terminal.Parser(prog=f"diffaccel eval {name}", description=f"{text[:1].upper()}{text[1:]}.")
    if name in _EXAMPLES:
        parser.epilog = f"example:\n  {_EXAMPLES[name]}"
    add = parser.add_argument
    kinds = "folders, zips, npz of images" + (", or npz or pkl of statistics (mu, sigma)" if name == "fid" else "")
    last = "" if name == "is" else "; the last is the reference"
    add("sets", nargs="+", metavar="SET", help=kinds + last)
    add_network_options(parser, DEFAULT.get(name, "tiny"))
    add_image_options(parser)
    add("--allow-mixed-n", action="store_true", help="several sets of different numbers of images in one table")
    if name == "fid":
        add("--infinity", action="store_true", help="also extrapolate to infinitely many images (arXiv 1911.07023)")
        add("--no-interval", dest="interval", action="store_false", help="leave out the interval")
    return parser


def _load_network(name: str, options: Any) -> tuple[Extractor, Protocol | None]:
    """Load the extractor that the options name for a command, and look up its protocol.

    Raises:
        DiffAccelError: for an Inception Score without classes, and a CMMD without a CLIP.
    """
    default = DEFAULT.get(name, "tiny")
    kind = (options.extractor or default).partition(":")[0]
    if name == "is" and kind not in _CLASSIFIERS:
        raise DiffAccelError(
            f"'{options.extractor}' gives features and no classes, which the Inception Score is of. Take inception, or "
            "py: or torchscript: with a network that returns logits."
        )
    if name == "fid" and (stand_in := _statistics_extractor(options)) is not None:
        return stand_in, None
    extractor, protocol = load_network(options, default)
    if name == "cmmd":
        from diffaccel.eval.networks.extractors import as_clip

        as_clip(extractor)
    return extractor, protocol


def _statistics_extractor(options: Any) -> Extractor | None:
    """Return a stand-in for the network of files of statistics, from which nothing has to be extracted any more.

    None where a set holds images, a network was named, or the statistics are of the default network.
    """
    from diffaccel.eval.features import statistics_files
    from diffaccel.eval.networks.extractors import Extractor

    if options.extractor or options.protocol:
        return None
    arrays = [statistics_files.arrays(Path(path).expanduser()) for path in options.sets]
    if not all({"mu", "sigma"} <= names and "arr_0" not in names for names in arrays):
        return None
    first = statistics_files.read(Path(options.sets[0]).expanduser())
    if first.feature_name == "tiny":
        return None
    return Extractor(
        name=first.feature_name or "an unknown network", key=f"FD-{first.feature_name or 'unknown'}",
        dim=first.moments.dim, weights_sha256=first.weights_sha256 or "", official=False,
        protocol=first.protocol or "own", network=lambda images: images,
    )  # fmt: skip


def _load_sets(options: Any, settings: MetricSettings, *, statistics: bool) -> list[FeatureSet]:
    """Load the features, or where ``statistics`` allows it the moments, of every set of the command line."""
    from diffaccel.eval.features.sets import load

    arguments = extraction_arguments(options)
    sets = [
        load(path, settings.extractor, spatial=settings.spatial is not None, statistics=statistics, **arguments)
        for path in options.sets
    ]
    if len({images.name for images in sets}) < len(sets):  # folders of one name in different places
        sets = [replace(images, name=path) for images, path in zip(sets, options.sets, strict=True)]
    return sets


def _measure(
    options: Any,
    metrics: Sequence[Metric],
    sets: Sequence[FeatureSet],
    reference: FeatureSet | None,
    settings: MetricSettings,
) -> tuple[list[Row], list[str]]:
    """Measure every set against the reference; return the rows, and warnings about sets and measures."""
    from diffaccel.eval.comparison import set_metrics
    from diffaccel.eval.features.sets import check_counts

    check_counts(sets, mixed=options.allow_mixed_n)
    rows: list[Row] = []
    warnings = [text for images in (*sets, *([reference] if reference else [])) for text in images.warnings]
    for samples in sets:
        set_rows, set_warnings = set_metrics.measure(metrics, samples, reference, settings)
        rows += set_rows
        warnings += set_warnings
    return rows, warnings


def _spatial(extractor: Any, metrics: Sequence[Metric]) -> Any:
    """Return the extractor of sFID's spatial features; None where no metric needs them."""
    return extractor.at("spatial") if any(metric.tap == "spatial" for metric in metrics) else None


# -- stats ------------------------------------------------------------------------------------------------------------


def run_stats(argv: list[str]) -> int:
    """Run ``eval stats`` and return its exit status."""
    options = parse(_stats_parser(), argv)
    terminal.check_output("--out", options.out)
    from diffaccel.eval.features.sets import load
    from diffaccel.eval.features.statistics_files import StatisticsFile, write
    from diffaccel.eval.metrics.frechet import Moments

    extractor, protocol = load_network(options, "tiny")
    spatial = protocol is not None and _spatial(extractor, protocol.metrics) is not None
    images = load(options.images, extractor, spatial=spatial, statistics=False, **extraction_arguments(options))
    statistics = StatisticsFile(
        moments=Moments.of(images.features), feature_name=extractor.name, weights_sha256=extractor.weights_sha256,
        protocol=extractor.protocol if protocol is None else protocol.name,
        spatial=None if images.spatial is None else _moments(images.spatial),
    )  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write(options.out, statistics)
    values = {
        "command": ["diffaccel", "eval", "stats", *argv], "file": str(options.out), "n": images.n,
        "dim": extractor.dim, "extractor": extractor.name, "protocol": statistics.protocol,
        "weights_sha256": extractor.weights_sha256, "warnings": images.warnings,
    }  # fmt: skip
    if write_json(options, values):
        terminal.write(f"{options.out}: {images.n} images, {extractor.dim} features of {extractor.name}")
    return 0


def _stats_parser() -> terminal.Parser:
    parser = terminal.Parser(
        prog="diffaccel eval stats",
        description="Mean and covariance of a set's features as npz, which pytorch-fid can read too.",
        epilog="example:\n  diffaccel eval stats photos -o photos.npz --protocol tf-fid",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder, zip, or npz of images")
    parser.add_argument(
        "-o", "--out", type=terminal.output_path, required=True, metavar="FILE", help="the npz to write"
    )
    add_network_options(parser, "tiny")
    add_image_options(parser)
    return parser


def _moments(features: Tensor | Moments) -> Moments:
    from diffaccel.eval.metrics.frechet import Moments

    return features if isinstance(features, Moments) else Moments.of(features)

"""``diffaccel eval fid``, ``kid``, ``is``, ``prdc``, ``cmmd`` and ``stats``: sets of images against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal as console
from diffaccel.errors import DiffAccelError
from diffaccel.eval.commands import options as shared

if TYPE_CHECKING:
    from diffaccel.eval.networks.protocols import Metric

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


def run_distance(name: str, argv: list[str]) -> int:
    """One of :data:`COMMANDS`; returns its exit status."""
    options = shared.checked(_parser(name).parse(argv))
    from diffaccel.eval.comparison import set_metrics
    from diffaccel.eval.comparison.set_metrics import Setting
    from diffaccel.eval.features import sets as feature_sets
    from diffaccel.eval.networks import protocols

    alone = name == "is"
    if not alone and len(options.sets) < 2:
        raise DiffAccelError(f"'eval {name}' compares sets with a reference, the last one. Give at least two.")
    chosen = protocols.protocol(options.protocol) if options.protocol else None
    metrics = protocols.metrics(name, chosen)
    extractor, chosen = _network(name, options)
    fid = name == "fid"
    setting = Setting(
        extractor=extractor, spatial=_spatial(extractor, metrics), protocol=chosen,
        interval=fid and options.interval, infinity=fid and options.infinity,
    )  # fmt: skip
    how = shared.extraction(options)
    sets = [
        feature_sets.load(path, extractor, spatial=setting.spatial is not None, statistics=fid, **how)
        for path in options.sets
    ]
    if len({one.name for one in sets}) < len(sets):  # folders of one name in different places
        sets = [replace(one, name=path) for one, path in zip(sets, options.sets, strict=True)]
    reference = None if alone else sets.pop()
    feature_sets.check_counts(sets, mixed=options.allow_mixed_n)
    rows, warnings = [], [text for one in (*sets, *([reference] if reference else [])) for text in one.warnings]
    for samples in sets:
        found, said = set_metrics.measure(metrics, samples, reference, setting)
        rows += found
        warnings += said
    if chosen is not None and chosen.name == "cmmd" and not extractor.name.startswith(protocols.CMMD_NETWORK):
        warnings.append(f"CMMD is published with {protocols.CMMD_NETWORK}; this is {extractor.name}.")
    shared.report(options, [name, *argv], rows, warnings)
    return 0


run_fid = partial(run_distance, "fid")
run_kid = partial(run_distance, "kid")
run_is = partial(run_distance, "is")
run_prdc = partial(run_distance, "prdc")
run_cmmd = partial(run_distance, "cmmd")


def run_stats(argv: list[str]) -> int:
    """``eval stats``; returns its exit status."""
    parser = console.Parser(
        prog="diffaccel eval stats",
        description="Mean and covariance of a set's features as npz, which pytorch-fid can read too.",
        epilog="example:\n  diffaccel eval stats photos -o photos.npz --protocol tf-fid",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder, zip, or npz of images")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the npz to write")
    shared.add_network(parser, "tiny")
    shared.add_images(parser)
    options = shared.checked(parser.parse(argv))
    from diffaccel.eval.features import sets as feature_sets
    from diffaccel.eval.features import statistics_files as feature_statistics
    from diffaccel.eval.metrics.frechet import Moments

    extractor, chosen = shared.network(options, "tiny")
    spatial = chosen is not None and _spatial(extractor, chosen.metrics) is not None
    found = feature_sets.load(
        options.images, extractor, spatial=spatial, statistics=False, **shared.extraction(options)
    )
    written = feature_statistics.StatisticsFile(
        moments=Moments.of(found.features), feature_name=extractor.name, weights_sha256=extractor.weights_sha256,
        protocol=extractor.protocol if chosen is None else chosen.name,
        spatial=None if found.spatial is None else _moments(found.spatial),
    )  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    feature_statistics.write(options.out, written)
    made = {
        "command": ["diffaccel", "eval", "stats", *argv], "file": str(options.out), "n": found.n, "dim": extractor.dim,
        "extractor": extractor.name, "protocol": written.protocol, "weights_sha256": extractor.weights_sha256,
        "warnings": found.warnings,
    }  # fmt: skip
    if shared.write_json(options, made):
        console.write(f"{options.out}: {found.n} images, {extractor.dim} features of {extractor.name}")
    return 0


def _parser(name: str) -> console.Parser:
    text = COMMANDS[name]
    parser = console.Parser(prog=f"diffaccel eval {name}", description=f"{text[:1].upper()}{text[1:]}.")
    if name in _EXAMPLES:
        parser.epilog = f"example:\n  {_EXAMPLES[name]}"
    add = parser.add_argument
    takes = "folders, zips, npz of images" + (", or npz or pkl of statistics (mu, sigma)" if name == "fid" else "")
    last = "" if name == "is" else "; the last is the reference"
    add("sets", nargs="+", metavar="SET", help=takes + last)
    shared.add_network(parser, DEFAULT.get(name, "tiny"))
    shared.add_images(parser)
    add("--allow-mixed-n", action="store_true", help="several sets of different numbers of images in one table")
    if name == "fid":
        add("--infinity", action="store_true", help="also extrapolate to infinitely many images (arXiv 1911.07023)")
        add("--no-interval", dest="interval", action="store_false", help="leave out the jackknife, ten distances")
    return parser


def _network(name: str, options: Any) -> Any:
    kind = (options.extractor or DEFAULT.get(name, "tiny")).partition(":")[0]
    if name == "is" and kind not in _CLASSIFIERS:
        raise DiffAccelError(
            f"'{options.extractor}' gives features and no classes, which the Inception Score is of. Take inception, or "
            "py: or torchscript: with a network that returns logits."
        )
    if name == "fid" and (alone := _of_statistics_alone(options)) is not None:
        return alone, None
    found = shared.network(options, DEFAULT.get(name, "tiny"))
    if name == "cmmd":
        from diffaccel.eval.networks.extractors import as_clip

        as_clip(found[0])
    return found


def _of_statistics_alone(options: Any) -> Any:
    """What stands for the network of files of statistics that another one made: nothing has to be extracted.

    None where there are images, or a network was named.
    """
    from diffaccel.eval.features import statistics_files as feature_statistics
    from diffaccel.eval.networks.extractors import Extractor

    if options.extractor or options.protocol:
        return None
    held = [feature_statistics.arrays(Path(path).expanduser()) for path in options.sets]
    if not all({"mu", "sigma"} <= one and "arr_0" not in one for one in held):
        return None
    first = feature_statistics.read(Path(options.sets[0]).expanduser())
    if first.feature_name == "tiny":
        return None
    return Extractor(
        name=first.feature_name or "an unknown network", key=f"FD-{first.feature_name or 'unknown'}",
        dim=first.moments.dim, weights_sha256=first.weights_sha256 or "", official=False,
        protocol=first.protocol or "own", network=lambda images: images,
    )  # fmt: skip


def _spatial(extractor: Any, metrics: Sequence[Metric]) -> Any:
    """The extractor of sFID's features, where it is wanted."""
    return extractor.at("spatial") if any(metric.tap == "spatial" for metric in metrics) else None


def _moments(found: Any) -> Any:
    from diffaccel.eval.metrics.frechet import Moments

    return found if isinstance(found, Moments) else Moments.of(found)

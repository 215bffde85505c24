"""``diffaccel eval fid``, ``kid``, ``prdc`` and ``stats``: distances of two sets of images, and statistics of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffaccel import console
from diffaccel.errors import DiffAccelError

COMMANDS = {
    "fid": "Fréchet distance of two sets of images (or statistics), named after its network",
    "kid": "kernel distance of two sets of images",
    "prdc": "precision, recall, density and coverage of two sets of images",
}


def run_distance(name: str, argv: list[str]) -> int:
    """One of :data:`COMMANDS`; returns its exit status."""
    parser = console.Parser(prog=f"diffaccel eval {name}", description=COMMANDS[name][:1].upper() + COMMANDS[name][1:])
    add = parser.add_argument
    takes = "folder, zip, npz of images" + (", or npz of statistics (mu, sigma)" if name == "fid" else "")
    add("samples", metavar="A", help=takes)
    add("reference", metavar="B", help=takes)
    _shared(parser)
    options = parser.parse(argv)
    from diffaccel.eval import distances
    from diffaccel.eval.frechet import Moments

    extractor = _extractor(options)
    warnings: list[str] = []
    a, b = (_side(path, options, extractor, warnings) for path in (options.samples, options.reference))
    if name != "fid" and (isinstance(a, Moments) or isinstance(b, Moments)):
        raise DiffAccelError("This needs the images of both sets, not statistics. Give folders, zips or npz of images.")
    found = {"fid": distances.fid, "kid": distances.kid, "prdc": distances.prdc}[name](a, b)
    values = {distances.key(metric, extractor): value for metric, value in found.items()}
    n, m = (side.n if isinstance(side, Moments) else len(side) for side in (a, b))
    if n is not None and m is not None and min(n, m) <= extractor.dim:
        warnings.append(f"{min(n, m)} images give a singular covariance of {extractor.dim} features.")
    result = {"values": values, "n": n, "m": m, "extractor": extractor.name, "weights_sha256": extractor.weights_sha256}
    if options.json:
        console.write_json(result | {"warnings": warnings})
        return 0
    for key, value in values.items():
        console.write(f"{key}: {value:.6g} (n = {n or 'unknown'}, m = {m or 'unknown'})")
    for warning in warnings:
        console.write_note(f"warning: {warning}")
    return 0


def run_stats(argv: list[str]) -> int:
    """``eval stats``; returns its exit status."""
    parser = console.Parser(
        prog="diffaccel eval stats",
        description="Mean and covariance of a set's features as npz, which pytorch-fid can read too.",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder, zip, or npz of images")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the npz to write")
    _shared(parser)
    options = parser.parse(argv)
    from diffaccel.eval import feature_statistics
    from diffaccel.eval.frechet import Moments

    extractor = _extractor(options)
    warnings: list[str] = []
    features = _features(options.images, options, extractor, warnings)
    if len(features) < 2:
        raise DiffAccelError(f"Statistics need at least 2 images; '{options.images}' holds {len(features)}.")
    written = feature_statistics.StatisticsFile(
        moments=Moments.of(features), feature_name=extractor.name, protocol=extractor.protocol,
        weights_sha256=extractor.weights_sha256,
    )  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    feature_statistics.write(options.out, written)
    console.write(f"{options.out}: {len(features)} images, {extractor.dim} features of {extractor.name}")
    for warning in warnings:
        console.write_note(f"warning: {warning}")
    return 0


def _shared(parser: console.Parser) -> None:
    parser.add_argument("--extractor", default="tiny", metavar="NAME", help="feature network (default: tiny)")
    parser.add_argument("--num", type=int, metavar="N", help="only the first N images of each set")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="images in one call (default 64)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _extractor(options: Any) -> Any:
    from diffaccel import opening
    from diffaccel.eval.extractors import extractor

    return extractor(options.extractor, device=opening.pick_device(options.device))


def _features(path: str, options: Any, extractor: Any, warnings: list[str]) -> Any:
    from diffaccel.eval.features import extract
    from diffaccel.eval.images import open_source

    found = extract(open_source(path, num=options.num), extractor, batch=options.batch)
    warnings += found.warnings
    return found.values


def _side(path: str, options: Any, extractor: Any, warnings: list[str]) -> Any:
    """Features of a set, or moments where it is a file of statistics."""
    from diffaccel.eval import feature_statistics
    from diffaccel.eval.images import open_source

    if not (path.endswith(".npz") and open_source(path).kind == "statistics"):
        return _features(path, options, extractor, warnings)
    file = feature_statistics.read(path, dim=extractor.dim)
    if file.weights_sha256 not in (None, extractor.weights_sha256):
        raise DiffAccelError(
            f"'{path}' holds statistics of '{file.feature_name}', another network than '{extractor.name}'. "
            "Give its --extractor, or make the statistics again with diffaccel eval stats."
        )
    if file.assumed:
        warnings.append(f"'{path}' does not say its {', '.join(file.assumed)}: assumed to be of {extractor.name}.")
    return file.moments

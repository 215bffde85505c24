"""``diffaccel eval clip`` and ``eval paired``: pictures by their prompts, and pictures against their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.commands.options import add_image_options, parse, shows_progress, write_machine_rows, write_rows

if TYPE_CHECKING:
    from diffaccel.eval.comparison.fidelity import Distance
    from diffaccel.eval.comparison.row import Row
    from diffaccel.eval.sets.run import Pairs, Run

COMMANDS = {
    "clip": "how well images fit their prompts, by a CLIP; how alike they are to paired images",
    "paired": "PSNR, SSIM, LPIPS and latent error of paired images, with the worst pairs",
}
JUDGE = "emoji-clip-judge"
METRICS = ("psnr", "ssim", "lpips", "latent_error")
_SHOWN = 3  # names of worst pairs in a table


# -- clip -------------------------------------------------------------------------------------------------------------


def run_clip(argv: list[str]) -> int:
    """Run ``eval clip`` and return its exit status."""
    options = parse(_clip_parser(), argv)
    from diffaccel.eval.comparison import prompt_scores
    from diffaccel.eval.networks.extractors import as_clip, extractor
    from diffaccel.runs import loading

    run, paired = _open_images(options.images), _open_images(options.pairs) if options.pairs else None
    prompts = _prompts(options.prompts, run)
    if prompts is None and paired is None:
        raise DiffAccelError(
            f"The prompts of '{options.images}' are not known. Give them with --prompts FILE, or a folder that "
            "diffaccel made, or other images with --pairs."
        )
    if options.num is not None:
        run = _first(run, options.num)
        prompts = prompts and prompts[: options.num]
        paired = paired and _restricted(paired, run)
    clip = as_clip(extractor(options.clip, device=loading.pick_device(options.device)))
    rows, warnings = prompt_scores.rows(
        run, clip, prompts, paired=paired, batch=options.batch, progress=shows_progress(options)
    )
    warnings += _order_warnings(run, prompts) if options.prompts else []
    write_rows(options, ["clip", *argv], rows, warnings)
    return 0


def _clip_parser() -> terminal.Parser:
    parser = terminal.Parser(
        prog="diffaccel eval clip",
        description="CLIP score of images and their prompts, 100 max(cos, 0) a picture, and as 2.5 max(cos, 0).",
        epilog="example:\n  diffaccel eval clip runs/dpm8 --pairs runs/base --clip emoji-clip-judge\n"
        "  diffaccel eval clip photos --prompts prompts.txt --clip open_clip:ViT-B-32-quickgelu:openai",
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="a run, whose prompts are known; or a folder, zip or npz of images")
    add("--prompts", metavar="FILE", help="one prompt an image, in the order of their names, 2 before 10")
    add("--pairs", metavar="IMAGES", help="images that belong to these: CLIP-I, and the score's difference to theirs")
    add("--clip", default=JUDGE, metavar="NAME", help=f"a CLIP of the zoo, or open_clip:... (default {JUDGE})")
    add_image_options(parser)
    return parser


def _open_images(path: str) -> Run:
    """Open a run's folder, or any images as a run whose pictures have names alone.

    Raises:
        DiffAccelError: for a file of statistics, which holds no images.
    """
    from diffaccel.eval.images.open import open_source
    from diffaccel.eval.sets.run import Picture, Run, open_run

    file = Path(path).expanduser()
    if not file.is_file():
        return open_run(path)
    source = open_source(file)
    if source.kind == "statistics":
        raise DiffAccelError(f"'{path}' holds statistics and no images; this needs the images themselves.")
    return Run(source.name, file, tuple(Picture(id=name, file=file / name) for name in source.ids))


def _prompts(file: str | None, run: Run) -> list[str] | None:
    """Return the prompt of every picture: from the file, else the run's own, which may be None."""
    from diffaccel.eval.metrics.clip_score import check_prompts
    from diffaccel.eval.sets import prompts

    if run.is_video:
        raise DiffAccelError(f"'{run.path}' holds videos, and a CLIP reads images. See diffaccel eval compare.")
    if file is None:
        return run.prompts
    if run.prompts is not None:
        raise DiffAccelError(f"'{run.path}' knows the prompts of its images. Leave --prompts out.")
    texts = list(prompts.read(file).texts)
    check_prompts(texts, len(run))
    return texts


def _order_warnings(run: Run, prompts: Sequence[str] | None) -> list[str]:
    """Warn where nothing but the order of names says which image a prompt of a file belongs to."""
    from diffaccel.eval.images.names import are_consecutive

    ids = [picture.id for picture in run.pictures]
    if prompts is None or are_consecutive(ids):
        return []
    return [
        f"The images of '{run.path}' are not numbered from 0 or 1 without gaps, so prompts go to them in the order of "
        f"their names: from '{ids[0]}' with '{prompts[0]}' to '{ids[-1]}' with '{prompts[-1]}'."
    ]


def _first(run: Run, num: int) -> Run:
    """Return the run with its first ``num`` pictures."""
    if num > len(run):
        raise DiffAccelError(f"{num} images were asked for, but '{run.name}' holds {len(run)}. Ask for fewer.")
    return replace(run, pictures=run.pictures[:num])


def _restricted(paired: Run, run: Run) -> Run:
    """Return the paired run with the pictures that belong to those of ``run``."""
    keys = {picture.key for picture in run.pictures}
    return replace(paired, pictures=tuple(picture for picture in paired.pictures if picture.key in keys))


# -- paired -----------------------------------------------------------------------------------------------------------


def run_paired(argv: list[str]) -> int:
    """Run ``eval paired`` and return its exit status."""
    options = parse(_paired_parser(), argv)
    from diffaccel.eval.sets.run import pair, same_noise

    baseline, run = _open_images(options.baseline), _open_images(options.images)
    if run.is_video or baseline.is_video:
        raise DiffAccelError("These metrics are of images. Videos are compared by diffaccel eval compare.")
    if run.name == baseline.name:  # folders of one name in different places
        baseline, run = replace(baseline, name=options.baseline), replace(run, name=options.images)
    pairs = pair(baseline, run)[: options.num]
    if options.num is not None and len(pairs) < options.num:
        raise DiffAccelError(f"{options.num} pairs were asked for, but there are {len(pairs)}. Ask for fewer.")
    distances, rows = _distances(options, baseline, run)
    rows += _measure(options, baseline, run, pairs, distances)
    warnings = [f"{images.name}: {text}" for images in (baseline, run) for text in images.warnings]
    if same_noise(baseline, run, pairs) is False:
        warnings.append(f"{run.name} and {baseline.name} did not start from equal noise, though seeds are equal.")
    if write_machine_rows(options, ["paired", *argv], rows, warnings):
        _print_table(f"{run.name} against {baseline.name}, {len(pairs)} pairs", rows)
    return 0


def _paired_parser() -> terminal.Parser:
    parser = terminal.Parser(
        prog="diffaccel eval paired",
        description="Distances of images to the baseline's of the same prompt and seed, or of the same name.",
        epilog="example:\n  diffaccel eval paired runs/base runs/dpm8 --metrics psnr,lpips --lpips alexnet.pth",
    )
    add = parser.add_argument
    add("baseline", metavar="A", help="a run, or a folder, zip or npz of images")
    add("images", metavar="B", help="the images that are measured against it")
    add("--metrics", metavar="NAMES", help=f"of {', '.join(METRICS)} (default: all that can be measured)")
    add("--lpips", metavar="FILE", help="AlexNet's weights for LPIPS (default: where weights are looked for)")
    add_image_options(parser)
    return parser


def _metric_names(text: str | None) -> tuple[str, ...]:
    """Return the metrics of ``--metrics``, all where it is not given."""
    names = METRICS if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in METRICS:
            raise unknown("paired metric", name, METRICS)
    return names


def _distances(options: Any, baseline: Run, run: Run) -> tuple[list[Distance], list[Row]]:
    """Return the distances that can be measured, and rows that say why the others cannot.

    A metric that was asked for by name is never left out: measuring it raises what is wrong.
    """
    from diffaccel.eval.comparison.fidelity import BUILT_IN, lpips_distance
    from diffaccel.eval.comparison.row import missing
    from diffaccel.eval.metrics import paired
    from diffaccel.eval.networks import lpips
    from diffaccel.eval.networks.weights import MissingWeights
    from diffaccel.runs import loading

    names, named = _metric_names(options.metrics), options.metrics is not None
    smallest = min(min(size) for images in (baseline, run) for size in images.source.sizes)
    reasons: dict[str, str] = {}
    if smallest < paired.WINDOW and not named:
        reasons["ssim"] = f"images are under {paired.WINDOW} pixels a side"
    distances = [distance for distance in BUILT_IN if distance.metric in names and distance.metric not in reasons]
    if "lpips" in names:
        try:
            network = lpips.load(options.lpips, device=loading.pick_device(options.device))
        except MissingWeights as error:
            if named or options.lpips:
                raise
            reasons["lpips"] = str(error)
        else:
            fewest = lpips.BACKBONES["alex"].smallest
            if smallest < fewest and not named:
                reasons["lpips"] = f"images are under {fewest} pixels a side"
            else:
                distances.append(lpips_distance(network))
    keys = {"ssim": "SSIM", "lpips": "LPIPS-Alex"}
    better: dict[str, Any] = {"ssim": "higher", "lpips": "lower"}
    return distances, [
        missing(name, keys[name], "fidelity", run.name, better[name], why) for name, why in reasons.items()
    ]


def _measure(options: Any, baseline: Run, run: Run, pairs: Pairs, distances: Sequence[Distance]) -> list[Row]:
    """Measure the distances of every pair; each row names its worst pairs."""
    from diffaccel.eval.comparison import fidelity
    from diffaccel.eval.comparison.paired_scores import cluster_labels

    clusters, names = cluster_labels(baseline, pairs), _metric_names(options.metrics)
    rows = []
    for distance, values in fidelity.measure(baseline, run, pairs, distances, batch=options.batch):
        if distance.metric in names:
            row = fidelity.row(run, distance, values, clusters=clusters, floor=None)
            row.detail |= {"reference": baseline.name}
            row.detail["worst"] = [baseline.pictures[pairs[i][0]].id for i in row.detail["worst"]]
            rows.append(row)
    if options.metrics and "latent_error" in names and not any(row.metric == "latent_error" for row in rows):
        raise DiffAccelError("The latent error needs latents of one shape in both runs. Make them with --latents.")
    return rows


def _print_table(title: str, rows: Sequence[Row]) -> None:
    columns = ("metric", "mean", "95 %", "median", "p95", "worst")
    lines = []
    for row in rows:
        if row.missing:
            terminal.write_note(f"{row.key} is not measured: {row.missing}")
            continue
        unit = f" {row.unit}" if row.unit else ""
        mean = "identical" if row.value is None else f"{row.value:.5g}{unit}"
        interval = "" if row.interval is None else f"{row.interval.low:.5g} to {row.interval.high:.5g}"
        spread = [f"{row.detail[name]:.5g}" for name in ("median", "p95")]
        lines.append((row.key, mean, interval, *spread, ", ".join(row.detail["worst"][:_SHOWN])))
    terminal.write_table(title, columns, lines)

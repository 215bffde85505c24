"""``diffaccel eval clip`` and ``eval paired``: pictures by their prompts, and pictures against their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal as console
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.commands import options as shared

if TYPE_CHECKING:
    from diffaccel.eval.comparison.fidelity import Distance
    from diffaccel.eval.comparison.row import Row
    from diffaccel.eval.sets.run import Run

COMMANDS = {
    "clip": "how well images fit their prompts, by a CLIP; how alike they are to paired images",
    "paired": "PSNR, SSIM, LPIPS and latent error of paired images, with the worst pairs",
}
JUDGE = "emoji-clip-judge"
METRICS = ("psnr", "ssim", "lpips", "latent_error")
_SHOWN = 3  # names of worst pairs in a table


def run_clip(argv: list[str]) -> int:
    """``eval clip``; returns its exit status."""
    parser = console.Parser(
        prog="diffaccel eval clip",
        description="CLIP score of images and their prompts, 100 max(cos, 0) a picture, and as 2.5 max(cos, 0).",
        epilog="example:\n  diffaccel eval clip runs/dpm8 --pairs runs/base --clip emoji-clip-judge\n"
        "  diffaccel eval clip photos --prompts prompts.txt --clip open_clip:ViT-B-32-quickgelu:openai",
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="a run, whose prompts are known; or a folder, zip or npz of images")
    add("--prompts", metavar="FILE", help="one prompt an image, in the order of their names")
    add("--pairs", metavar="IMAGES", help="images that belong to these: CLIP-I, and the score's difference to theirs")
    add("--clip", default=JUDGE, metavar="NAME", help=f"a CLIP of the zoo, or open_clip:... (default {JUDGE})")
    shared.add_images(parser)
    options = shared.checked(parser.parse(argv))
    from diffaccel.eval.comparison import prompt_scores
    from diffaccel.eval.networks.extractors import as_clip, extractor
    from diffaccel.runs import loading as opening

    run, other = _opened(options.images), _opened(options.pairs) if options.pairs else None
    prompts = _prompts(options.prompts, run)
    if prompts is None and other is None:
        raise DiffAccelError(
            f"The prompts of '{options.images}' are not known. Give them with --prompts FILE, or a folder that "
            "diffaccel made, or other images with --pairs."
        )
    if options.num is not None:
        run = _cut(run, options.num)
        prompts = prompts and prompts[: options.num]
        other = other and _only(other, run)
    clip = as_clip(extractor(options.clip, device=opening.pick_device(options.device)))
    found, said = prompt_scores.rows(
        run, clip, prompts, other=other, batch=options.batch, progress=shared.progress(options)
    )
    shared.report(options, ["clip", *argv], found, said)
    return 0


def run_paired(argv: list[str]) -> int:
    """``eval paired``; returns its exit status."""
    parser = console.Parser(
        prog="diffaccel eval paired",
        description="Distances of images to the baseline's of the same prompt and seed, or of the same name.",
        epilog="example:\n  diffaccel eval paired runs/base runs/dpm8 --metrics psnr,lpips --lpips alexnet.pth",
    )
    add = parser.add_argument
    add("baseline", metavar="A", help="a run, or a folder, zip or npz of images")
    add("images", metavar="B", help="the images that are measured against it")
    add("--metrics", metavar="NAMES", help=f"of {', '.join(METRICS)} (default: all that can be measured)")
    add("--lpips", metavar="FILE", help="AlexNet's weights for LPIPS (default: where weights are looked for)")
    shared.add_images(parser)
    options = shared.checked(parser.parse(argv))
    from diffaccel.eval.comparison import fidelity
    from diffaccel.eval.comparison import paired_scores as scored
    from diffaccel.eval.sets.run import pair, same_noise

    baseline, run = _opened(options.baseline), _opened(options.images)
    if run.is_video or baseline.is_video:
        raise DiffAccelError("These metrics are of images. Videos are compared by diffaccel eval compare.")
    if run.name == baseline.name:  # folders of one name in different places
        baseline, run = replace(baseline, name=options.baseline), replace(run, name=options.images)
    pairs = pair(baseline, run)[: options.num]
    if options.num is not None and len(pairs) < options.num:
        raise DiffAccelError(f"{options.num} pairs were asked for, but there are {len(pairs)}. Ask for fewer.")
    distances, rows = _distances(options, baseline, run)
    clusters = scored.units(baseline, pairs)
    wanted = _wanted(options.metrics)
    for distance, values in fidelity.measure(baseline, run, pairs, distances, batch=options.batch):
        if distance.metric in wanted:
            row = fidelity.row(run, distance, values, clusters=clusters, floor=None)
            row.detail |= {"reference": baseline.name}
            row.detail["worst"] = [baseline.pictures[pairs[i][0]].id for i in row.detail["worst"]]
            rows.append(row)
    if options.metrics and "latent_error" in wanted and not any(row.metric == "latent_error" for row in rows):
        raise DiffAccelError("The latent error needs latents of one shape in both runs. Make them with --latents.")
    said = [f"{one.name}: {text}" for one in (baseline, run) for text in one.source.warnings]
    if same_noise(baseline, run, pairs) is False:
        said.append(f"{run.name} and {baseline.name} did not start from equal noise, though seeds are equal.")
    if shared.finish(options, ["paired", *argv], rows, said):
        _table(f"{run.name} against {baseline.name}, {len(pairs)} pairs", rows)
    return 0


def _opened(path: str) -> Run:
    """A run, or any images by their names."""
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
    """One of each picture: of a file, or the run's own."""
    from diffaccel.eval.metrics import clip_score as alignment
    from diffaccel.eval.sets import prompts

    if run.is_video:
        raise DiffAccelError(f"'{run.path}' holds videos, and a CLIP reads images. See diffaccel eval compare.")
    if file is None:
        return run.prompts
    if run.prompts is not None:
        raise DiffAccelError(f"'{run.path}' knows the prompts of its images. Leave --prompts out.")
    texts = list(prompts.read(file).texts)
    alignment.check_prompts(texts, len(run))
    return texts


def _cut(run: Run, num: int) -> Run:
    if num > len(run):
        raise DiffAccelError(f"{num} images were asked for, but '{run.name}' holds {len(run)}. Ask for fewer.")
    return replace(run, pictures=run.pictures[:num])


def _only(other: Run, run: Run) -> Run:
    keys = {picture.key for picture in run.pictures}
    return replace(other, pictures=tuple(picture for picture in other.pictures if picture.key in keys))


def _wanted(text: str | None) -> tuple[str, ...]:
    names = METRICS if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in METRICS:
            raise unknown("paired metric", name, METRICS)
    return names


def _distances(options: Any, baseline: Run, run: Run) -> tuple[list[Distance], list[Row]]:
    """What is measured, and rows that say why the rest is not; a metric that was asked for by name must be possible."""
    from diffaccel.eval.comparison import fidelity
    from diffaccel.eval.comparison.row import missing
    from diffaccel.eval.metrics import paired
    from diffaccel.eval.networks import lpips
    from diffaccel.eval.networks.weights import MissingWeights
    from diffaccel.runs import loading as opening

    wanted, asked = _wanted(options.metrics), options.metrics is not None
    smallest = min(min(size) for one in (baseline, run) for size in one.source.sizes)
    lacking: dict[str, str] = {}
    if smallest < paired.WINDOW and not asked:
        lacking["ssim"] = f"images are under {paired.WINDOW} pixels a side"
    found = [one for one in fidelity.BUILT_IN if one.metric in wanted and one.metric not in lacking]
    if "lpips" in wanted:
        try:
            network = lpips.load(options.lpips, device=opening.pick_device(options.device))
        except MissingWeights as error:
            if asked or options.lpips:
                raise
            lacking["lpips"] = str(error)
        else:
            fewest = lpips.BACKBONES["alex"].smallest
            if smallest < fewest and not asked:
                lacking["lpips"] = f"images are under {fewest} pixels a side"
            else:
                about = {"weights_sha256": network.weights_sha256}
                found.append(fidelity.Distance("lpips", "LPIPS-Alex", "lower", "", network, about))
    keys = {"ssim": "SSIM", "lpips": "LPIPS-Alex"}
    better: dict[str, Any] = {"ssim": "higher", "lpips": "lower"}
    rows = [missing(name, keys[name], "fidelity", run.name, better[name], why) for name, why in lacking.items()]
    return found, rows


def _table(title: str, rows: Sequence[Row]) -> None:
    columns = ("metric", "mean", "95 %", "median", "p95", "worst")
    shown = []
    for row in rows:
        if row.missing:
            console.write_note(f"{row.key} is not measured: {row.missing}")
            continue
        unit = f" {row.unit}" if row.unit else ""
        mean = "identical" if row.value is None else f"{row.value:.5g}{unit}"
        interval = "" if row.interval is None else f"{row.interval.low:.5g} to {row.interval.high:.5g}"
        spread = [f"{row.detail[name]:.5g}" for name in ("median", "p95")]
        shown.append((row.key, mean, interval, *spread, ", ".join(row.detail["worst"][:_SHOWN])))
    console.write_table(title, columns, shown)

"""``diffaccel eval run``: a set of pictures in a folder, as many as are asked for or as a question needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffaccel import terminal, zoo
from diffaccel.errors import DiffAccelError
from diffaccel.runs.cost import drawn_before
from diffaccel.runs.loading import quiet_libraries

if TYPE_CHECKING:
    from diffaccel.runs.generate import Early
    from diffaccel.runs.request import Request
    from diffaccel.runs.variant import Variant


def _parser() -> terminal.Parser:
    parser = terminal.Parser(
        prog="diffaccel eval run",
        description="Generate a set of pictures into a folder. Repeat the command to go on after a stop.",
        epilog="example:\n  diffaccel eval run --prompts prompts.txt --accel dpmpp2m:steps=8 --out runs/dpm8\n"
        "  diffaccel eval run --prompts prompts.txt --accel dpmpp2m:steps=8 --out runs/dpm8 --baseline runs/base"
        ' --until "ssim within 0.02"\n'
        "  accelerate launch --num_processes 2 -m diffaccel eval run --prompts prompts.txt --out runs/base",
    )
    add = parser.add_argument
    add(
        "--prompts",
        metavar="FILE",
        help="txt, jsonl, json, csv, tsv, - for stdin, or emoji-1000; classes for a model of classes",
    )
    add("--first", type=int, metavar="N", help="only the first N prompts")
    add("--accel", default="plain", metavar="VARIANT", help="plain, plain:steps=8, dpmpp2m:steps=8, or a YAML file")
    terminal.add_model_options(parser)
    add("--num", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)")
    add("--seed", type=int, default=0, metavar="S", help="picture i of the run uses seed S + i (default 0)")
    add(
        "--batch", type=int, default=8, metavar="B", help="pictures in one pipeline call (default 8); changes last bits"
    )
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of each process; changes last bits")
    add("--frames", type=int, metavar="N", help="frames of each video (default: the model's own)")
    add("--fps", type=float, metavar="F", help="frames a second of the video (default: the model's own)")
    add("--latents", action="store_true", help="keep what the decoder was given, for the latent error")
    add("--baseline", metavar="RUN", help="with --until: the finished run that this one is compared with")
    add(
        "--until",
        metavar="RULE",
        help='stop once it is proven or refuted, as in "ssim within 0.02 and lpips within 0.1"',
    )
    add("--looks", metavar="N,N,...", help="with --until: pictures after which to look (default 64,128,256,...)")
    add("--out", type=terminal.output_path, required=True, metavar="DIR", help="the run's folder")
    add("--overwrite", action="store_true", help="throw away the run that is in the folder")
    add("--json", action="store_true", help="print the record as one JSON object, and no progress")
    return parser


def run_generate(argv: list[str]) -> int:
    """Run ``eval run`` and return its exit status."""
    options = _parser().parse(argv)
    from diffaccel.runs.generate import generate_run
    from diffaccel.runs.variant import parse

    variant = parse(options.accel)
    request = _request(options, variant)
    quiet_libraries(options.json or options.model in zoo.names())
    record = generate_run(
        request, options.out, overwrite=options.overwrite, early=_stopping_rule(options, request),
        progress=not options.json, command=["diffaccel", "eval", "run", *argv],
    )  # fmt: skip
    if record["rank"] == 0:
        terminal.write_json(record) if options.json else terminal.write(_summary(record, variant.name))
    return 0


def _request(options: Any, variant: Variant) -> Request:
    """Return the request that the options describe, drawn by the variant."""
    from diffaccel.eval.sets import requests
    from diffaccel.runs import loading
    from diffaccel.runs.request import Request

    request = Request(
        model=options.model, num=options.num, seed=options.seed, batch=options.batch, dtype=options.dtype,
        device=options.device, threads=options.threads, latents=options.latents, frames=options.frames,
        fps=options.fps,
    )  # fmt: skip
    texts = requests.load_texts(options.prompts, options.first)
    return variant.of(requests.with_texts(request, texts, loading.pipeline_class(options.model), options.first))


def _stopping_rule(options: Any, request: Request) -> Early | None:
    """Return the rule of ``--until``; None without that option."""
    if options.until is None:
        if options.baseline is not None or options.looks is not None:
            option = "--baseline" if options.baseline is not None else "--looks"
            raise DiffAccelError(f'{option} goes with --until RULE, such as --until "ssim within 0.02".')
        return None
    if options.baseline is None:
        raise DiffAccelError("--until compares with a finished run. Name it: --baseline RUN.")
    from diffaccel.eval.timing import early_stop
    from diffaccel.runs import loading

    try:
        looks = [int(number) for number in (options.looks or "").split(",") if number.strip()]
    except ValueError:
        raise DiffAccelError(f"--looks is '{options.looks}'; it must be numbers, such as 64,128,256.") from None
    device = loading.pick_device(options.device)
    return early_stop.stopping_rule(options.until, options.baseline, request, looks=looks, device=device)


def _summary(record: dict[str, Any], variant: str) -> str:
    """Return how many pictures were drawn, by which variant and at what cost; and what ``--until`` proved."""
    from diffaccel.eval.report.summary import counted_things

    cost, count = record["cost"], len(record["images"])
    cost_text = f"{cost['seconds'] / count:.3f} s and {cost['nfe'] / count:g} NFE each"
    if "joules" in cost:
        cost_text += f", {cost['joules'] / count:.3g} J"
    things = "videos" if "frames" in record["images"][0] else "pictures"
    text = f"{counted_things(count, things)} in {record['out']} by {variant}: {cost_text}"
    if before := drawn_before(record, "picture"):
        text += f"\n{before}"
    if until := record.get("until"):
        text += f"\n{until['sentence']}"
    return text

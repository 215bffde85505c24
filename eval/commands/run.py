"""``diffaccel eval run``: a set of pictures in a folder, as many as are asked for or as a question needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffaccel import terminal as console
from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.runs.loading import quiet_libraries


def _parser() -> console.Parser:
    parser = console.Parser(
        prog="diffaccel eval run",
        description="Generate a set of pictures into a folder. Repeat the command to go on after a stop.",
        epilog="example:\n  diffaccel eval run --prompts prompts.txt --accel dpmpp2m:steps=8 --out runs/dpm8\n"
        "  diffaccel eval run --prompts prompts.txt --accel dpmpp2m:steps=8 --out runs/dpm8 --baseline runs/base"
        ' --until "ssim within 0.02"\n'
        "  accelerate launch --num_processes 2 -m diffaccel eval run --prompts prompts.txt --out runs/base",
    )
    add = parser.add_argument
    add("--prompts", metavar="FILE", help="txt, jsonl, json, csv or tsv, or emoji-1000; classes for a model of classes")
    add("--first", type=int, metavar="N", help="only the first N prompts")
    add("--accel", default="plain", metavar="VARIANT", help="plain, plain:steps=8, dpmpp2m:steps=8, or a YAML file")
    console.add_model_options(parser)
    add("--num", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)")
    add("--seed", type=int, default=0, metavar="S", help="picture i of the run uses seed S + i (default 0)")
    add(
        "--batch", type=int, default=8, metavar="B", help="pictures in one pipeline call (default 8); changes last bits"
    )
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of each process; changes last bits")
    add("--latents", action="store_true", help="keep what the decoder was given, for the latent error")
    add("--baseline", metavar="RUN", help="with --until: the finished run that this one is compared with")
    add(
        "--until",
        metavar="RULE",
        help='stop once it is proven or refuted, as in "ssim within 0.02 and lpips within 0.1"',
    )
    add("--looks", metavar="N,N,...", help="with --until: pictures after which to look (default 64,128,256,...)")
    add("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    add("--overwrite", action="store_true", help="throw away the run that is in the folder")
    add("--json", action="store_true", help="print the record as one JSON object, and no progress")
    return parser


def run(argv: list[str]) -> int:
    """The command; returns its exit status."""
    options = _parser().parse(argv)
    from diffaccel.eval.sets import requests as subjects
    from diffaccel.runs import loading as opening
    from diffaccel.runs import variant as variants
    from diffaccel.runs.generate import generate_run
    from diffaccel.runs.request import Request

    variant = variants.parse(options.accel)
    request = Request(
        model=options.model, num=options.num, seed=options.seed, batch=options.batch, dtype=options.dtype,
        device=options.device, threads=options.threads, latents=options.latents,
    )  # fmt: skip
    texts = subjects.texts_of(options.prompts, options.first)
    request = variant.of(subjects.drawing(opening.pipeline_class(options.model), request, texts))
    quiet_libraries(options.json or options.model in zoo.names())
    record = generate_run(
        request, options.out, overwrite=options.overwrite, early=_early(options, request),
        progress=not options.json, command=["diffaccel", "eval", "run", *argv],
    )  # fmt: skip
    if record["rank"] == 0:
        cost, n = record["cost"], len(record["images"])
        each = f"{cost['seconds'] / n:.3f} s and {cost['nfe'] / n:g} NFE each"
        text = f"{n} pictures in {record['out']} by {variant.name}: {each}"
        if until := record.get("until"):
            text += f"\n{until['sentence']}"
        console.write_json(record) if options.json else console.write(text)
    return 0


def _early(options: Any, request: Any) -> Any:
    if options.until is None:
        if options.baseline is not None or options.looks is not None:
            given = "--baseline" if options.baseline is not None else "--looks"
            raise DiffAccelError(f'{given} goes with --until RULE, such as --until "ssim within 0.02".')
        return None
    if options.baseline is None:
        raise DiffAccelError("--until compares with a finished run. Name it: --baseline RUN.")
    from diffaccel.eval.timing import early_stop
    from diffaccel.runs import loading as opening

    try:
        looks = [int(number) for number in (options.looks or "").split(",") if number.strip()]
    except ValueError:
        raise DiffAccelError(f"--looks is '{options.looks}'; it must be numbers, such as 64,128,256.") from None
    device = opening.pick_device(options.device)
    return early_stop.early(options.until, options.baseline, request, looks=looks, device=device)

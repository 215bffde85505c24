"""``diffaccel eval``: runs of named prompts, and reports that compare them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import console, zoo
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval import command_sets

if TYPE_CHECKING:
    from diffaccel.eval.comparison import Comparison
    from diffaccel.eval.gate import Gate

COMMANDS = {
    "run": "generate a set of pictures: prompts, seeds, one way to draw them; resumable",
    "time": "variants of one model in turns on this machine: seconds, parts, memory, and ratios with intervals",
    "compare": "runs against a baseline: a report as JSON, markdown and one HTML file",
    **command_sets.COMMANDS,
    "stats": "mean and covariance of a set's features, for later distances",
}
GATE_FAILED = 5


def run(argv: list[str]) -> int:
    """The command; returns its exit status."""
    parser = console.Parser(prog="diffaccel eval", description="What an acceleration costs, and what it buys.")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below; each has its own --help")
    width = max(map(len, COMMANDS)) + 2
    parser.epilog = "commands:\n" + "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    options = parser.parse(argv[:1])
    if options.command is None:
        parser.print_help()
        return 2
    if options.command not in COMMANDS:
        raise unknown("command of eval", options.command, COMMANDS)
    if options.command in command_sets.COMMANDS:
        return command_sets.run_distance(options.command, argv[1:])
    return {"stats": command_sets.run_stats, "run": run_run, "time": run_time, "compare": run_compare}[options.command](
        argv[1:]
    )


# -- run --------------------------------------------------------------------------------------------------------------


def _run_parser() -> console.Parser:
    parser = console.Parser(
        prog="diffaccel eval run",
        description="Generate a set of pictures into a folder. Repeat the command to go on after a stop.",
        epilog="example:\n  diffaccel eval run --prompts prompts.txt --accel dpmpp2m:steps=8 --out runs/dpm8\n"
        "  accelerate launch --num_processes 2 -m diffaccel eval run --prompts prompts.txt --out runs/base",
    )
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help="txt, jsonl, json, csv or tsv")
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
    add("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    add("--overwrite", action="store_true", help="throw away the run that is in the folder")
    add("--json", action="store_true", help="print the record as one JSON object, and no progress")
    return parser


def run_run(argv: list[str]) -> int:
    """``eval run``; returns its exit status."""
    options = _run_parser().parse(argv)
    from diffaccel import variants
    from diffaccel.eval import prompts
    from diffaccel.requests import Request
    from diffaccel.sampling import generate_run

    if options.first is not None and options.first < 1:
        raise DiffAccelError(f"--first is {options.first}; it must be at least 1.")
    variant = variants.parse(options.accel)
    request = variant.of(
        Request(
            prompts=prompts.read(options.prompts).first(options.first).texts, model=options.model, num=options.num,
            seed=options.seed, batch=options.batch, dtype=options.dtype, device=options.device,
            threads=options.threads, latents=options.latents,
        )
    )  # fmt: skip
    console.quiet_libraries(options.json or options.model in zoo.names())
    record = generate_run(
        request, options.out, overwrite=options.overwrite, progress=not options.json,
        command=["diffaccel", "eval", "run", *argv],
    )  # fmt: skip
    if record["rank"] == 0:
        cost, n = record["cost"], len(record["images"])
        each = f"{cost['seconds'] / n:.3f} s and {cost['nfe'] / n:g} NFE each"
        text = f"{n} pictures in {record['out']} by {variant.name}: {each}"
        console.write_json(record) if options.json else console.write(text)
    return 0


# -- time -------------------------------------------------------------------------------------------------------------


def run_time(argv: list[str]) -> int:
    """``eval time``; returns its exit status."""
    parser = console.Parser(
        prog="diffaccel eval time",
        description="Time variants of one model in turns; the first one is the baseline.",
        epilog="example:\n  diffaccel eval time plain plain:steps=8 dpmpp2m:steps=8 --out timing.json",
    )
    add = parser.add_argument
    add("variants", nargs="+", metavar="VARIANT", help="plain, plain:steps=8, dpmpp2m:steps=8, or YAML files")
    console.add_model_options(parser)
    add("--prompt", default="a red apple", help="what every call draws")
    add("--batch", type=int, default=1, metavar="B", help="pictures in one call (default 1)")
    add("--turns", type=int, default=10, metavar="N", help="timed calls of each variant (default 10)")
    add("--warm-up", type=int, default=3, metavar="N", help="calls of each before the first turn (default 3)")
    add("--out", type=Path, metavar="FILE", help="write the timing as JSON, for diffaccel eval compare --timing")
    add("--json", action="store_true", help="print it as one JSON object")
    options = parser.parse(argv)
    from diffaccel import opening, record, variants
    from diffaccel.eval.timing import take_turns
    from diffaccel.requests import Request

    chosen = [variants.parse(text) for text in options.variants]
    request = Request(
        prompts=(options.prompt,), num=options.batch, batch=options.batch, model=options.model, dtype=options.dtype,
        device=options.device,
    ).with_model_defaults()  # fmt: skip
    console.quiet_libraries(options.json or options.model in zoo.names())
    device = opening.pick_device(options.device)
    folder, _ = opening.locate(options.model)
    pipe = opening.open_pipeline(request, folder, device, opening.pick_dtype(options.dtype, device))
    timing = take_turns(
        pipe, request, chosen, turns=options.turns, warm_up=options.warm_up, progress=_progress(options)
    )
    timing["command"] = ["diffaccel", "eval", "time", *argv]
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record.write_json(options.out, timing)
    if options.json:
        console.write_json(timing)
        return 0
    console.write(f"{timing['device']['name']}, {timing['turns']} turns, {options.batch} a call")
    for entry in timing["variants"]:
        ratio = entry.get("ratio")
        text = "baseline" if ratio is None else f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        if ratio is not None and not ratio["significant"]:
            text += ", speed-up not significant"
        console.write(f"  {entry['name']:<28}{entry['seconds_per_image']:9.4f} s a picture   {text}")
    return 0


# -- compare ----------------------------------------------------------------------------------------------------------


def _compare_parser() -> console.Parser:
    parser = console.Parser(
        prog="diffaccel eval compare",
        description="Compare runs of the same prompts and seeds with a baseline.",
        epilog="example:\n  diffaccel eval compare runs/base runs/dpm8 --other-seeds runs/base2 --report report"
        ' --fail-if "ssim<0.8"',
    )
    add = parser.add_argument
    add("baseline", metavar="BASE", help="folder of the baseline's run")
    add("runs", nargs="+", metavar="RUN", help="folders of the runs to compare with it")
    add("--other-seeds", metavar="RUN", help="the baseline drawn with other seeds: what chance alone does")
    add("--extractor", action="append", metavar="NAME", help="network for distances of distributions (default: tiny)")
    add("--clip", action="append", metavar="NAME", help="CLIP for the fit to the prompts: of the zoo, or open_clip:...")
    add("--reference", metavar="PATH", help="images that distributions are compared with (default: the baseline's)")
    add("--device", default="auto", help="where networks compute: cpu, cuda, cuda:1, mps (default: the best there is)")
    add(
        "--lpips",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure LPIPS-Alex too, with AlexNet's weights from FILE or the cache",
    )
    add("--timing", metavar="FILE", help="timing.json of turns on one machine")
    add("--report", type=Path, metavar="DIR", help="write report.json, report.md and report.html here")
    add("--fail-if", metavar="RULE", help='exit with 5 when it holds for a run, as in "ssim<0.8 or speedup<1.5"')
    add("--json", action="store_true", help="print the report as one JSON object")
    return parser


def run_compare(argv: list[str]) -> int:
    """``eval compare``; returns its exit status: 5 when the rule of ``--fail-if`` holds."""
    options = _compare_parser().parse(argv)
    from diffaccel import opening
    from diffaccel.eval import gate as gates
    from diffaccel.eval import report
    from diffaccel.eval.comparison import compare_runs, fidelity
    from diffaccel.eval.extractors import as_clip, extractor
    from diffaccel.eval.images import open_source
    from diffaccel.eval.report import text
    from diffaccel.eval.runs import open_run

    device = opening.pick_device(options.device)
    gate = gates.parse(options.fail_if) if options.fail_if else None
    timing = _timing(options.timing)
    distances = list(fidelity.BUILT_IN)
    if options.lpips is not None:
        from diffaccel.eval.lpips import load

        lpips = load(options.lpips or None)
        distances.append(fidelity.Distance("lpips", "LPIPS-Alex", "lower", "", lpips))
    comparison = compare_runs(
        open_run(options.baseline), [open_run(path) for path in options.runs],
        others=open_run(options.other_seeds) if options.other_seeds else None,
        extractors=[extractor(name, device=device) for name in options.extractor or ["tiny"]],
        clips=[as_clip(extractor(name, device=device)) for name in options.clip or ()],
        reference=open_source(options.reference) if options.reference else None,
        distances=distances, timing=timing, progress=_progress(options),
    )  # fmt: skip
    failed, said = _judge(gate, comparison)
    command = ["diffaccel", "eval", "compare", *argv]
    if options.report is not None:
        made = report.write(comparison, options.report, command=command)
    else:
        made = comparison.to_dict() | {"command": command, "verdicts": text.verdicts(comparison)}
    console.write_json(made) if options.json else console.write(text.markdown(comparison, made))
    for sentence in said:
        console.write_note(sentence)
    return GATE_FAILED if failed else 0


def _judge(gate: Gate | None, comparison: Comparison) -> tuple[bool, list[str]]:
    """Whether the rule holds for a run, and what it found of each."""
    failed, said = False, []
    for run in comparison.runs if gate else ():
        fails, sentences = gate.check(comparison.gate_values(run.name))  # type: ignore[union-attr]
        failed |= fails
        said += [f"{run.name}: {'FAILED' if fails else 'passed'}: {sentence}" for sentence in sentences]
    return failed, said


def _timing(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"The timing file '{path}' cannot be read ({error}).") from error


def _progress(options: Any) -> Callable[[str], None]:
    shown = sys.stderr.isatty() and not options.json
    return lambda text: console.write_note(text) if shown else None

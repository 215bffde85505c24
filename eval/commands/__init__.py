"""``diffaccel eval``: runs of named prompts, and reports that compare them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from diffaccel import terminal as console
from diffaccel import zoo
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.commands import pictures, sets
from diffaccel.eval.errors import MetricFailed
from diffaccel.runs.loading import quiet_libraries

# command -> function of its arguments that returns the exit status, and one line of help
COMMANDS = {
    "run": (
        "diffaccel.eval.commands.run:run",
        "generate a set of pictures: prompts, seeds, one way to draw them; resumable",
    ),
    "time": (
        "diffaccel.eval.commands:run_time",
        "variants of one model in turns on this machine: seconds, parts, memory, and ratios with intervals",
    ),
    "compare": (
        "diffaccel.eval.commands.compare:run_compare",
        "runs against a baseline: a report as JSON, markdown and one HTML file",
    ),
    "diff": ("diffaccel.eval.commands.compare:run_diff", "what changed between two reports, beyond their intervals"),
    **{name: (f"diffaccel.eval.commands.sets:run_{name}", text) for name, text in sets.COMMANDS.items()},
    **{name: (f"diffaccel.eval.commands.pictures:run_{name}", text) for name, text in pictures.COMMANDS.items()},
    "stats": ("diffaccel.eval.commands.sets:run_stats", "mean and covariance of a set's features, for later distances"),
    "list": (
        "diffaccel.eval.commands.listing:run",
        "metrics, protocols, extractors and scorers: what is here, and why not",
    ),
}


def run(argv: list[str]) -> int:
    """The command; returns its exit status."""
    parser = console.Parser(prog="diffaccel eval", description="What an acceleration costs, and what it buys.")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below; each has its own --help")
    width = max(map(len, COMMANDS)) + 2
    parser.epilog = "commands:\n" + "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    options = parser.parse(argv[:1])
    if options.command is None:
        parser.print_help()
        return 2
    if options.command not in COMMANDS:
        raise unknown("command of eval", options.command, COMMANDS)
    module, _, function = COMMANDS[options.command][0].partition(":")
    try:
        return getattr(import_module(module), function)(argv[1:])
    except (DiffAccelError, BrokenPipeError):
        raise
    except Exception as error:
        raise MetricFailed(
            f"'eval {options.command}' failed: {type(error).__name__}: {error} (DIFFACCEL_DEBUG=1 shows where)"
        ) from error


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
    from diffaccel.eval.commands.options import progress_of
    from diffaccel.eval.timing.turns import take_turns
    from diffaccel.files import write_json
    from diffaccel.runs import loading as opening
    from diffaccel.runs import variant as variants
    from diffaccel.runs.request import Request

    chosen = [variants.parse(text) for text in options.variants]
    request = Request(
        prompts=(options.prompt,), num=options.batch, batch=options.batch, model=options.model, dtype=options.dtype,
        device=options.device,
    ).with_model_defaults()  # fmt: skip
    quiet_libraries(options.json or options.model in zoo.names())
    device = opening.pick_device(options.device)
    folder, _ = opening.locate(options.model)
    pipe = opening.open_pipeline(request, folder, device, opening.pick_dtype(options.dtype, device))
    timing = take_turns(
        pipe,
        request,
        chosen,
        turns=options.turns,
        warm_up=options.warm_up,
        progress=progress_of(options),
    )
    timing["command"] = ["diffaccel", "eval", "time", *argv]
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, timing)
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

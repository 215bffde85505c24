"""``diffaccel eval time``: variants of one model in turns on this machine."""

from __future__ import annotations

from typing import Any

from diffaccel import terminal, zoo
from diffaccel.runs.loading import quiet_libraries

PROMPT = "a red apple"


def run_time(argv: list[str]) -> int:
    """Run ``eval time`` and return its exit status."""
    options = _parser().parse(argv)
    if options.out is not None:
        terminal.check_output("--out", options.out)
    timing = {**_measure(options), "command": ["diffaccel", "eval", "time", *argv]}
    if options.out is not None:
        from diffaccel.files import write_json

        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, timing)
    if options.json:
        terminal.write_json(timing)
    else:
        _print(timing, options.batch)
    return 0


def _parser() -> terminal.Parser:
    parser = terminal.Parser(
        prog="diffaccel eval time",
        description="Time variants of one model in turns; the first one is the baseline.",
        epilog="example:\n  diffaccel eval time plain plain:steps=8 dpmpp2m:steps=8 --out timing.json",
    )
    add = parser.add_argument
    add("variants", nargs="+", metavar="VARIANT", help="plain, plain:steps=8, dpmpp2m:steps=8, or YAML files")
    terminal.add_model_options(parser)
    add(
        "--prompt",
        metavar="TEXT",
        help=f"what every call draws (default '{PROMPT}'); the class, of a model that draws classes",
    )
    add("--batch", type=int, default=1, metavar="B", help="pictures in one call (default 1)")
    add("--frames", type=int, metavar="N", help="frames of each video (default: the model's own)")
    add("--turns", type=int, default=10, metavar="N", help="timed calls of each variant (default 10)")
    add("--warm-up", type=int, default=3, metavar="N", help="calls of each before the first turn (default 3)")
    add(
        "--out",
        type=terminal.output_path,
        metavar="FILE",
        help="write the timing as JSON, for diffaccel eval compare --timing",
    )
    add("--json", action="store_true", help="print it as one JSON object")
    return parser


def _measure(options: Any) -> dict[str, Any]:
    """Open the model and let its variants take turns."""
    from diffaccel.eval.commands.options import progress_printer
    from diffaccel.eval.sets import requests
    from diffaccel.eval.timing.turns import take_turns
    from diffaccel.eval.uncertainty.turns import LONG
    from diffaccel.runs import loading
    from diffaccel.runs.call_arguments import source_of
    from diffaccel.runs.request import Request
    from diffaccel.runs.variant import parse

    variants = [parse(text) for text in options.variants]
    request = Request(
        num=options.batch, batch=options.batch, model=options.model, dtype=options.dtype, device=options.device,
        frames=options.frames,
    )  # fmt: skip
    pipeline = loading.pipeline_class(options.model)
    default = (PROMPT,) if pipeline is None or source_of(pipeline) == "text" else ()
    texts = default if options.prompt is None else (options.prompt,)
    request = requests.with_texts(request, texts, pipeline).with_model_defaults()
    quiet_libraries(options.json or options.model in zoo.names())
    pipe = loading.open_plain(request)
    return take_turns(
        pipe, request, variants, turns=options.turns, warm_up=options.warm_up, meter_seconds=LONG,
        progress=progress_printer(options),
    )  # fmt: skip


def _print(timing: dict[str, Any], batch: int) -> None:
    """Print a line for every variant: seconds a picture, the ratio to the baseline, and energy where it was read."""
    terminal.write(f"{timing['device']['name']}, {timing['turns']} turns, {batch} a call")
    for entry in timing["variants"]:
        ratio = entry.get("ratio")
        text = "baseline" if ratio is None else _ratio_text(ratio)
        energy = "" if entry.get("energy_joules") is None else f"   {_energy_text(entry)}"
        terminal.write(f"  {entry['name']:<28}{entry['seconds_per_image']:9.4f} s a picture   {text}{energy}")


def _energy_text(entry: dict[str, Any]) -> str:
    """Return joules a picture and, over the baseline's, their ratio with its interval."""
    text, ratio = f"{entry['energy_joules']:.3f} J", entry.get("energy_ratio")
    if ratio is None:
        return text
    ends = "" if ratio["low"] is None else f", {ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{text} ({ratio['value']:.2f}x{ends})"


def _ratio_text(ratio: dict[str, Any]) -> str:
    if ratio["low"] is None:
        return f"{ratio['value']:.2f}x, {ratio['method']}"
    text = f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return text if ratio["significant"] else f"{text}, speed-up not significant"

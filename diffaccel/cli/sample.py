"""``diffaccel sample``: options to a request, and a finished run to a few lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffaccel import registry, zoo
from diffaccel import terminal as console
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.runs.loading import quiet_libraries
from diffaccel.runs.request import DTYPES, Request
from diffaccel.runs.variant import parse_fields, parse_size

_METHOD_OPTION = re.compile(r"--([A-Za-z0-9_-]+)\.([A-Za-z0-9_.-]+)(?:=(.*))?", re.DOTALL)
_EXAMPLES = """examples:
  diffaccel sample "a red apple, fluent 3d" --num 4 --seed 0
  diffaccel sample "a red apple" "two cats" --sampler dpmpp2m --steps 10 --out out/cats
  diffaccel sample "a cat walks" --model ./wan --frames 33      (video: one mp4 each)
  diffaccel sample --class goldfish --model ./dit                (and a model that takes neither needs neither)
  accelerate launch --num_processes 2 -m diffaccel sample "a red apple" --num 64    (one process a GPU)

A run that was stopped goes on when its command is repeated. Images carry what made them as PNG text; run.json in the
output folder holds all of it, with times, cost and sha256."""


def make_parser() -> console.Parser:
    """The options that every method shares."""
    parser = console.Parser(
        prog="diffaccel sample", description="Generate images from prompts, or video.", epilog=_EXAMPLES
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; several make --num images each")
    add("--class", action="append", dest="classes", metavar="C", help="number or name, for a model that draws classes")
    add("--num", type=int, default=1, metavar="N", help="images of each prompt (default 1)")
    add("--seed", type=int, default=0, metavar="S", help="image i of the run uses seed S + i (default 0)")
    console.add_model_options(parser)
    add("--sampler", metavar="NAME", help="the sampler; without it the pipeline's own loop runs. See diffaccel list")
    add("--steps", type=int, metavar="N", help="inference steps (default: the model's own)")
    add("--size", metavar="N|WxH", help="pixels, as 128 or WIDTHxHEIGHT (default: the model's own)")
    add("--guidance", type=float, metavar="G", help="classifier-free or embedded guidance (default: the model's own)")
    add("--frames", type=int, metavar="N", help="frames of each video (default: the model's own)")
    add("--fps", type=float, metavar="F", help="frames a second of the video (default: the model's own)")
    add("--negative", metavar="PROMPT", help="negative prompt")
    add("--batch", type=int, default=1, metavar="B", help="images in one pipeline call (default 1); changes last bits")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of each process; changes last bits")
    add("--out", type=Path, metavar="DIR", help="output folder (default: one in ./out named after the run)")
    add("--overwrite", action="store_true", help="throw away the run that is in the output folder")
    add("--json", action="store_true", help="print the record as one JSON object, and no progress")
    return parser


def run(argv: list[str]) -> int:
    """The command; returns its exit status."""
    rest, given = split_method_options(argv)
    parser = make_parser()
    if {"-h", "--help"} & set(rest):
        parser.epilog = f"{_method_help()}\n\n{_EXAMPLES}"
    options = parser.parse(rest, [f"--{name}.FIELD" for name in registry.names()])
    if options.dtype not in DTYPES:
        raise unknown("dtype", options.dtype, DTYPES)
    request = Request(
        prompts=tuple(options.prompts), classes=tuple(options.classes or ()), model=options.model, num=options.num,
        seed=options.seed, frames=options.frames, fps=options.fps,
        methods=methods(options.sampler, given), steps=options.steps, size=parse_size(options.size),
        guidance=options.guidance, negative=options.negative, batch=options.batch, dtype=options.dtype,
        device=options.device, threads=options.threads,
    )  # fmt: skip
    quiet_libraries(options.json or options.model in zoo.names())

    from diffaccel.runs.generate import generate_run

    command = ["diffaccel", "sample", *argv]
    record = generate_run(request, options.out, overwrite=options.overwrite, progress=not options.json, command=command)
    if record["rank"] == 0:
        console.write_json(record) if options.json else console.write(describe(record))
    return 0


def split_method_options(argv: list[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """``--NAME.FIELD VALUE`` apart from all other words, as ``{name: {field: value}}``."""
    rest, given = [], {}  # type: ignore[var-annotated]
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        match = _METHOD_OPTION.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        name, field, value = match.groups()
        if value is None:
            value = next(words, None)
        if value is None or value.startswith("--"):
            raise DiffAccelError(f"The option --{name}.{field} needs a value.")
        given.setdefault(name, {})[field.replace("-", "_")] = value
    return rest, given


def methods(sampler: str | None, given: dict[str, dict[str, str]]) -> tuple[Any, ...]:
    """The chosen sampler's config from its options.

    Raises:
        DiffAccelError: for an unknown sampler or option (with the nearest match), and options of another method.
    """
    known = registry.names()
    for name in given:
        if name not in known:
            raise unknown("method", name, known)
        if name != sampler:
            chosen = f"the sampler is '{sampler}'" if sampler else "no sampler was chosen"
            raise DiffAccelError(
                f"--{name}.{next(iter(given[name]))} is an option of '{name}', but {chosen}. "
                f"Pass --sampler {name}, or leave the option out."
            )
    if sampler is None:
        return ()
    if sampler not in known:
        raise unknown("sampler", sampler, known)
    config_class = registry.config_class(sampler)
    if config_class.touches != "loop":
        raise DiffAccelError(f"'{sampler}' is no sampler: it works on the {config_class.touches}.")
    return (config_class.from_dict(parse_fields(config_class, given.get(sampler, {}))),)


def describe(record: dict[str, Any]) -> str:
    """What a run made, in three lines."""
    settings, cost, images = record["settings"], record["cost"], record["images"]
    how = settings["methods"][0]["name"] if settings["methods"] else "the pipeline's own loop"
    files = images[0]["file"] if len(images) == 1 else f"{images[0]['file']} ... {images[-1]['file']}"
    steps = record["call"]["num_inference_steps"]
    what = "video" if "frames" in images[0] else "image"
    seconds = f"{cost['seconds']:.1f} s, {cost['seconds'] / len(images):.2f} s a{'n' * (what == 'image')} {what}"
    return (
        f"{len(images)} {what}{'s' * (len(images) > 1)} in {record['out']}: {files}\n"
        f"{settings['model']} by {how}: {steps} steps, {cost['nfe']} NFE, {cost['forwards']} rows through the network\n"
        f"{seconds} on {record['device']['name']} ({settings['dtype']})"
    )


def _method_help() -> str:
    """The options of every sampler, from its config dataclass."""
    from diffaccel.cli.listing import options_of

    blocks = []
    for name in registry.names():
        config_class = registry.config_class(name)
        if config_class.touches == "loop":
            rows = [f"  --{name}.{o['name']} ({o['type']}, default {o['default']})" for o in options_of(config_class)]
            blocks.append("\n".join([f"options of --sampler {name} (diffaccel explain {name}):", *rows]))
    return "\n\n".join(blocks)

"""``diffaccel sample``: a request from options, and a summary of the finished run."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffaccel import presets, registry, terminal, zoo
from diffaccel.cli import config_source
from diffaccel.errors import DiffAccelError, size_text, unknown
from diffaccel.presets import PresetPoint
from diffaccel.runs.cost import drawn_before
from diffaccel.runs.loading import find_folder, quiet_libraries
from diffaccel.runs.request import DTYPES, Request
from diffaccel.runs.variant import parse_fields, parse_size
from diffaccel.whole_folder import check_writable

PROMPT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv")

_METHOD_OPTION = re.compile(r"--([A-Za-z0-9_-]+)\.([A-Za-z0-9_.-]+)(?:=(.*))?", re.DOTALL)
_EXAMPLES = """examples:
  diffaccel sample "a red apple, fluent 3d" --num 4 --seed 0
  diffaccel sample "a red apple" "two cats" --sampler dpmpp2m --steps 10 --out out/cats
  diffaccel sample --prompts prompts.txt --batch 8               (one a line; - reads stdin)
  diffaccel sample "a cat walks" --model ./wan --frames 33      (video: one mp4 each)
  diffaccel sample "a cat, noto" "a teapot, noto" --sampler superdiff     (both prompts in one image)
  diffaccel sample "a red apple" --method spectrum --spectrum.growth 1.5       (a cache, under any sampler)
  diffaccel sample --class goldfish --model ./dit                (and a model that takes neither needs neither)
  diffaccel sample "a red apple" --preset out/tune/preset.json --quality balanced    (see diffaccel tune)
  accelerate launch --num_processes 2 -m diffaccel sample "a red apple" --num 64    (one process a GPU)

A run that was stopped goes on when its command is repeated. Images carry what made them as PNG text; run.json in the
output folder holds all of it, with times, cost and sha256."""


def make_parser() -> terminal.Parser:
    """Return the parser of the options that all methods share."""
    parser = terminal.Parser(
        prog="diffaccel sample", description="Generate images from prompts, or video.", epilog=_EXAMPLES
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="PROMPT", help="what to draw; several make --num images each")
    add("--prompts", metavar="FILE", help="prompts of a file, one a line, or - for stdin; also jsonl, csv, emoji-1000")
    add("--class", action="append", dest="classes", metavar="C", help="number or name, for a model that draws classes")
    add("--num", type=int, default=1, metavar="N", help="images of each prompt (default 1)")
    add("--seed", type=int, default=0, metavar="S", help="image i of the run uses seed S + i (default 0)")
    terminal.add_model_options(parser)
    add("--sampler", metavar="NAME", help="the sampler; without it the pipeline's own loop runs. See diffaccel list")
    add(
        "--method", action="append", default=[], metavar="NAME", help="a cache or another method on the network; repeat"
    )
    add("--preset", metavar="FILE", help="methods and steps of a preset that diffaccel tune wrote")
    add("--quality", metavar="NAME", help="point of the preset (default: the fastest certified one)")
    add("--steps", type=int, metavar="N", help="inference steps (default: the model's own)")
    add("--size", metavar="N|WxH", help="pixels, as 128 or WIDTHxHEIGHT (default: the model's own)")
    add("--guidance", type=float, metavar="G", help="classifier-free or embedded guidance (default: the model's own)")
    add("--frames", type=int, metavar="N", help="frames of each video (default: the model's own)")
    add("--fps", type=float, metavar="F", help="frames a second of the video (default: the model's own)")
    add("--negative", metavar="PROMPT", help="negative prompt")
    add("--batch", type=int, default=1, metavar="B", help="images in one pipeline call (default 1); changes last bits")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of each process; changes last bits")
    add(
        "--out",
        type=terminal.output_path,
        metavar="DIR",
        help="output folder (default: one in ./out named after the run)",
    )
    add("--overwrite", action="store_true", help="throw away the run that is in the output folder")
    add("--json", action="store_true", help="print the record as one JSON object, and no progress")
    return parser


def run(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    words, method_options = split_method_options(argv)
    parser = make_parser()
    if {"-h", "--help"} & set(words):
        parser.epilog = f"{_sampler_help()}\n\n{_EXAMPLES}"
    options = parser.parse(words, [f"--{name}.FIELD" for name in registry.names()])
    if options.dtype not in DTYPES:
        raise unknown("dtype", options.dtype, DTYPES)
    point = preset_point(options)
    configs = methods(options.sampler, method_options, options.method) if point is None else point.methods
    request = Request(
        prompts=composed(_prompts(options), options.prompts, configs),
        classes=tuple(options.classes or ()), model=options.model, num=options.num,
        seed=options.seed, frames=options.frames, fps=options.fps,
        methods=configs,
        steps=options.steps if point is None or options.steps is not None else point.call.get("steps"),
        size=parse_size(options.size),
        guidance=options.guidance, negative=options.negative, batch=options.batch, dtype=options.dtype,
        device=options.device, threads=options.threads,
    )  # fmt: skip
    from diffaccel.runs.early_checks import check_early, note_of_unknown_words
    from diffaccel.runs.generate import OUT, generate_run

    check_writable(options.out or Path(OUT))
    check_early(request)
    if (note := note_of_unknown_words(request)) and os.environ.get("RANK", "0") == "0":
        terminal.write_note(f"note: {note}")
    if point is not None and (note := note_of_other_settings(point, request.with_model_defaults())):
        terminal.write_note(f"note: {note}")
    quiet_libraries(options.json or options.model in zoo.names())
    command = ["diffaccel", "sample", *argv]
    record = generate_run(request, options.out, overwrite=options.overwrite, progress=not options.json, command=command)
    if record["rank"] == 0:
        terminal.write_json(record) if options.json else terminal.write(describe(record))
    return 0


def _prompts(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the prompts on the command line, or those of ``--prompts``.

    Raises:
        DiffAccelError: for both, for a prompt that names a file, and for a file that cannot be read.
    """
    words = tuple(options.words)
    if options.prompts is not None:
        if others := (*words, *(options.classes or ())):
            raise DiffAccelError(f"Got --prompts '{options.prompts}' and '{others[0]}'. Give one.")
        from diffaccel.eval.sets import prompts

        return prompts.read(options.prompts).texts
    if len(words) == 1 and _is_file(words[0]):
        raise DiffAccelError(
            f"'{words[0]}' is a file, and would be drawn as these words. To draw the prompts in it: --prompts "
            f"{words[0]}. To draw the words, put them another way."
        )
    if len(words) == 1 and not words[0].strip().count(" ") and words[0].strip().endswith(PROMPT_FILES):
        raise DiffAccelError(
            f"There is no file '{words[0]}', and its name would be drawn as these words. Give the path of a file of "
            "prompts to --prompts; to draw the words, put them another way."
        )
    return words


def composed(texts: tuple[str, ...], file: str | None, configs: Sequence[Any]) -> tuple[str, ...]:
    """Return the prompts of a run; those on the command line are one picture's components where a sampler says so.

    Args:
        file: of prompts; each of its lines stays a picture of its own.
    """
    separators = [config.separator for config in configs if getattr(config, "separator", "")]
    return (separators[0].join(texts),) if separators and texts and file is None else texts


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, nobody's home
        return False


def split_method_options(argv: list[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Split ``--NAME.FIELD VALUE`` off from all other words, as ``{name: {field: value}}``."""
    others: list[str] = []
    options: dict[str, dict[str, str]] = {}
    words = iter(argv)
    for word in words:
        if word == "--":
            others += [word, *words]
            break
        match = _METHOD_OPTION.fullmatch(word)
        if match is None:
            others.append(word)
            continue
        name, field, value = match.groups()
        if value is None:
            value = next(words, None)
        if value is None or value.startswith("--"):
            raise DiffAccelError(f"The option --{name}.{field} needs a value.")
        options.setdefault(name, {})[field.replace("-", "_")] = value
    return others, options


def methods(sampler: str | None, options: dict[str, dict[str, str]], on_network: Sequence[str] = ()) -> tuple[Any, ...]:
    """Return the configs of the methods on the network and of the sampler, made from their options.

    Raises:
        DiffAccelError: for an unknown method or option (with the nearest match), and options of another method.
    """
    names = registry.names()
    for name in options:
        if name not in names:
            raise unknown("method", name, names)
        if name not in (sampler, *on_network):
            choice = f"the sampler is '{sampler}'" if sampler else "no sampler was chosen"
            source = config_source.read(names[name])
            is_loop = source is None or source.variables.get("touches", "loop") == "loop"
            raise DiffAccelError(
                f"--{name}.{next(iter(options[name]))} is an option of '{name}', but {choice}. "
                f"Pass --{'sampler' if is_loop else 'method'} {name}, or leave the option out."
            )
    chosen = [("method", name) for name in on_network] + [("sampler", sampler)] * (sampler is not None)
    return tuple(_method(option, name, options.get(name, {})) for option, name in chosen if name is not None)


def _method(option: str, name: str, options: dict[str, str]) -> Any:
    """Return the config of one method, named by ``--sampler`` or ``--method``."""
    if name not in registry.names():
        raise unknown(option, name, registry.names())
    config_class = registry.config_class(name)
    if option == "sampler" and config_class.touches != "loop":
        raise DiffAccelError(
            f"'{name}' is no sampler: it works on the {config_class.touches}. Pass --method {name}, with or without a "
            "--sampler."
        )
    if option == "method" and config_class.touches == "loop":
        raise DiffAccelError(f"'{name}' is a sampler: it replaces the loop. Pass --sampler {name}.")
    return config_class.from_dict(parse_fields(config_class, options))


def preset_point(options: argparse.Namespace) -> PresetPoint | None:
    """Return the point of the preset that the options name, which fits the model; None where they name none.

    Raises:
        DiffAccelError: for a sampler beside a preset, a quality without one, and whatever is wrong with the file.
    """
    if options.preset is None:
        if options.quality is not None:
            raise DiffAccelError(f"--quality {options.quality} is a point of a preset. Pass --preset FILE as well.")
        return None
    if options.sampler is not None or options.method:
        other = f"--sampler is '{options.sampler}'" if options.sampler else f"--method is '{options.method[0]}'"
        raise DiffAccelError(f"--preset brings its own methods, and {other}. Leave one of them out.")
    preset = presets.read(options.preset)
    point = preset.point(options.quality)
    if (folder := find_folder(options.model)) is not None:
        preset.check_folder(folder)
    return point


def note_of_other_settings(point: PresetPoint, request: Request) -> str:
    """Return a sentence where a run is drawn in another way than its point's certificate is of; "" elsewhere."""
    measured = {"steps": point.call.get("steps"), **point.certificate.get("settings", {})}
    size = measured.get("size")
    measured["size"] = tuple(size) if size and len(size) == 2 else None
    for name in ("steps", "size", "guidance", "negative"):
        own = getattr(request, name)
        if name in measured and point.certificate and own != measured[name]:
            texts = [size_text(*v) if isinstance(v, tuple) else str(v) for v in (measured[name], own)]
            return (
                f"'{point.name}' was measured with {name} {texts[0]}, and this run has {texts[1]}: nothing is proven."
            )
    return ""


def describe(record: dict[str, Any]) -> str:
    """Summarise a run in lines: its files, its method and NFE, its time, and what was drawn before."""
    settings, cost, images = record["settings"], record["cost"], record["images"]
    method = " + ".join(config["name"] for config in settings["methods"]) or "the pipeline's own loop"
    files = images[0]["file"] if len(images) == 1 else f"{images[0]['file']} ... {images[-1]['file']}"
    count = record["call"].get("num_inference_steps", "?")
    steps = f"{count} step{'s' * (count != 1)}"
    noun = "video" if "frames" in images[0] else "image"
    seconds = f"{cost['seconds']:.1f} s, {cost['seconds'] / len(images):.2f} s a{'n' * (noun == 'image')} {noun}"
    before = drawn_before(record, noun)
    caches = cost.get("caches")
    calls = caches["real_calls"] + caches["skipped_calls"] if caches else 0
    skipped = f", {caches['skipped_calls']} of {calls} network calls skipped" if caches else ""
    if graphs := cost.get("graphs"):
        skipped += f", {graphs['replays']} replays of {graphs['graphs']} graphs"
    return (
        f"{len(images)} {noun}{'s' * (len(images) > 1)} in {record['out']}: {files}\n"
        f"{settings['model']} by {method}: {steps}, {cost['nfe']} NFE, {cost['forwards']} rows through the "
        f"network{skipped}\n{seconds} on {record['device']['name']} ({settings['dtype']})"
        + (f"\n{before}" if before else "")
    )


def _sampler_help() -> str:
    """Return the options of every method, read from its source; of one without readable source, only its name."""
    blocks = []
    for name, reference in registry.names().items():
        source = config_source.read(reference)
        touches = "loop" if source is None else source.variables.get("touches", "loop")
        option = "--sampler" if touches == "loop" else "--method"
        title = f"options of {option} {name} (diffaccel explain {name})"
        if source is None or source.options is None:
            blocks.append(title)
            continue
        rows = [f"  --{name}.{o['name']} ({o['type']}, default {o['default']})" for o in source.options]
        blocks.append("\n".join([f"{title}:", *rows]))
    return "\n\n".join(blocks)

"""``diffaccel distill``: a student that draws in one network call, from a pipeline and prompts alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffaccel import registry, terminal, zoo
from diffaccel.cli.sample import split_method_options
from diffaccel.errors import DiffAccelError
from diffaccel.files import as_os_errors, remove_leftovers
from diffaccel.folder_lock import FolderLock
from diffaccel.runs.threads import cpu_threads
from diffaccel.runs.variant import parse_fields, parse_size
from diffaccel.whole_folder import check_writable, unwritable

OUT = Path("out") / "distill"
UNFINISHED = 4  # stopped by --seconds; the same command goes on
_EXAMPLES = """examples:
  diffaccel distill                                               (emoji-flux)
  diffaccel distill ./sd3 --prompts prompts.txt --sim.steps 4000 --sim.batch 256 --out runs/sd3
  accelerate launch -m diffaccel distill ./sd3 --prompts prompts.txt --sim.sequential true --sharded
  diffaccel distill --method tscd --out runs/tscd && diffaccel distill --init runs/tscd/student --sim.noise-ratio 1000
  diffaccel sample "a red apple, noto" --model out/distill/student --steps 1

No pictures are needed. A run that was stopped goes on when its command is repeated. Options of the method are
--sim.FIELD VALUE; --preset takes those of another point of the same family."""


def make_parser() -> terminal.Parser:
    """Return the parser of the command."""
    parser = terminal.Parser(
        prog="diffaccel distill", description="Distil a pipeline into one network call.", epilog=_EXAMPLES
    )
    add = parser.add_argument
    add("model", nargs="?", default=zoo.DEFAULT, metavar="MODEL", help=f"as --model of sample (default {zoo.DEFAULT})")
    add("--method", default="sim", metavar="NAME", help="of distillation: sim (default) or tscd")
    add("--init", type=Path, metavar="DIR", help="student of an earlier stage that this one begins with")
    add("--preset", metavar="NAME", help="sim, sid, diff-instruct, dmd, fgm or paper: settings to start from")
    add("--sharded", action="store_true", help="under accelerate launch: parts of all networks, not a copy a process")
    add("--prompts", metavar="SET", help="a packaged set or a file (default emoji-1000 for emoji-flux)")
    add("--size", metavar="N|WxH", help="pixels, as 128 or WIDTHxHEIGHT (default: the model's own)")
    add("--guidance", type=float, metavar="G", help="of the teacher (default: the model's own)")
    add("--negative", metavar="PROMPT", help="negative prompt of the teacher")
    add(
        "--evaluate",
        type=int,
        default=0,
        metavar="N",
        help="log a meter and a judge every N drawings (default 0: never)",
    )
    add("--evaluate-prompts", type=int, default=64, metavar="K", help="pictures of an evaluation (default 64)")
    add("--judge", metavar="NAME", help="network of evaluations, or none (default emoji-clip-judge for emoji-flux)")
    add("--seconds", type=float, metavar="S", help="stop after this time; the same command goes on")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads")
    add("--seed", type=int, default=0, metavar="K", help="of noise and prompts (default 0)")
    add("--dtype", default="auto", help="of the networks' arithmetic (default: float32 on a CPU, else bfloat16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--out", type=terminal.output_path, default=OUT, metavar="DIR", help=f"folder of the run (default {OUT})")
    return parser


def run(argv: list[str]) -> int:
    """Run the command and return its exit status: 4 where time was up before the last step."""
    words, method_options = split_method_options(argv)
    options = make_parser().parse(words, [f"--{name}.FIELD" for name in registry.TRAINERS])
    config_class, train = registry.trainer(options.method)
    config = _config(config_class, options.preset, method_options)
    if options.prompts is None and options.model != zoo.DEFAULT:
        raise DiffAccelError(
            f"--prompts is missing: what '{options.model}' is to draw. Give a file, one prompt a line."
        )
    if options.seconds is not None and not options.seconds > 0:
        raise DiffAccelError(f"--seconds is {options.seconds:g}; it must be above 0. Leave it out to make all steps.")
    if not 0 <= options.seed < 2**63:
        raise DiffAccelError(f"--seed is {options.seed}; it must be from 0 to 2**63 - 1.")
    for name in ("evaluate", "evaluate_prompts"):
        if getattr(options, name) < 0:
            raise DiffAccelError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 0.")
    if options.judge not in (None, "none") and not options.evaluate:
        raise DiffAccelError(f"--judge is {options.judge}, but no pictures are drawn for it. Add --evaluate N.")
    if options.sharded and options.evaluate and _judge(options) != "none":
        raise DiffAccelError("--sharded draws no pictures for a judge while it trains. Add --judge none.")
    check_writable(options.out)
    from diffaccel import processes
    from diffaccel.eval.sets import prompts
    from diffaccel.runs import loading
    from diffaccel.runs.call_arguments import call_arguments
    from diffaccel.runs.request import Request

    request = Request(
        model=options.model, prompts=("x",), size=parse_size(options.size), guidance=options.guidance,
        negative=options.negative, threads=options.threads, dtype=options.dtype, device=options.device,
    ).with_model_defaults()  # fmt: skip
    texts = prompts.read(options.prompts or "emoji-1000").texts
    launch, device = processes.join(loading.pick_device(options.device))
    dtype = loading.pick_dtype(options.dtype, device)
    loading.quiet_libraries(True)
    pipe = loading.open_pipeline(request, loading.locate(options.model)[0], device, dtype)
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(pipe, request)
    evaluate = _evaluation(options, pipe, texts, arguments, device) if launch.rank == 0 else None
    if launch.rank == 0:
        terminal.write_note(looks(options.evaluate, config, "none" if evaluate is None else _judge(options)))
    with cpu_threads(options.threads), alone(options.out, launch.rank):
        done = train(
            pipe, texts, config, options.out, name=options.model, arguments=arguments, seconds=options.seconds,
            seed=options.seed, device=device, dtype=dtype, processes=launch, evaluate_every=options.evaluate,
            evaluate=evaluate, begin=options.init, sharded=options.sharded, tell=terminal.write_note,
        )  # fmt: skip
    if launch.rank == 0:
        terminal.write(
            f"{done.step} of {config.steps} steps, {done.pictures} drawings, {done.seconds:.0f} s\n"
            f"student: {options.out / 'student'}"
        )
    return 0 if done.step >= config.steps else UNFINISHED


def looks(every: int, config: Any, judge: str) -> str:
    """Return in a sentence when a run is looked at while it trains, and by what.

    Args:
        every: drawings between evaluations; 0 for none.
        config: options of the method.
        judge: name of a network, or "none".
    """
    from diffaccel.distill.train import evaluation_steps

    drawings = config.steps * config.batch
    if not every:
        return "Not looked at while it trains (--evaluate 0): log.jsonl gets losses alone."
    if (steps := evaluation_steps(every, config.batch)) > config.steps:
        return f"Never looked at: --evaluate is {every}, and the run ends after {drawings} drawings. Give fewer."
    what = "the convergence meter" if judge == "none" else f"the convergence meter and the judge {judge}"
    return f"Looked at after every {steps * config.batch} of {drawings} drawings: log.jsonl gets {what}."


def _evaluation(options: Any, pipe: Any, texts: Sequence[str], arguments: dict[str, Any], device: Any) -> Any:
    """Return what looks at pictures of the run; None where none are asked for."""
    judge = _judge(options)
    if not options.evaluate or judge == "none":
        return None
    from diffaccel.distill.evaluation import PictureEvaluation
    from diffaccel.eval.networks import extractors

    count = min(options.evaluate_prompts, len(texts))
    spread = [texts[row * len(texts) // count] for row in range(count)]
    return PictureEvaluation(pipe, spread, arguments, extractors.extractor(judge, device=device))


def _judge(options: Any) -> str:
    """Return the name of the network that looks at pictures, or "none"."""
    if not options.evaluate_prompts:
        return "none"
    return options.judge or ("emoji-clip-judge" if options.model == zoo.DEFAULT else "none")


@contextlib.contextmanager
def alone(out: Path, rank: int) -> Iterator[None]:
    """Keep other runs from the folder, by its lock in the first process, and name a folder that cannot be written."""
    lock = FolderLock(out)
    try:
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()  # before anything is removed: it may be what another run is writing
            remove_leftovers(out, r"checkpoint\.(?:safetensors|json)|evaluation\.safetensors")
        with as_os_errors():
            yield
    except OSError as error:
        if error.errno is None:  # a library's own, such as of a model that it cannot read
            raise
        raise unwritable(out, error) from error
    finally:
        lock.release()


def _config(config_class: type[Any], preset: str | None, options: dict[str, dict[str, str]]) -> Any:
    """Return a method's config from a preset and options."""
    for name in options:
        if name != config_class.name:
            raise DiffAccelError(
                f"--{name}.{next(iter(options[name]))} is no option of '{config_class.name}'. "
                f"Write --{config_class.name}.FIELD VALUE."
            )
    changes = parse_fields(config_class, options.get(config_class.name, {}))
    known = [field.name for field in dataclasses.fields(config_class)]
    config_class.from_dict({key: value for key, value in changes.items() if key not in known})  # names an unknown one
    if not hasattr(config_class, "preset"):
        if preset:
            raise DiffAccelError(f"--preset is {preset}, but '{config_class.name}' has no presets. Leave it out.")
        return config_class(**changes)
    if preset == "paper":
        return config_class.paper(**changes)
    return config_class.preset(preset or config_class.name, **changes)

"""``diffaccel quantize`` with data: a network is trained with few bits, and saved when all steps are made."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from diffaccel import registry, terminal
from diffaccel.cli.distill import UNFINISHED, alone
from diffaccel.errors import DiffAccelError
from diffaccel.runs.variant import parse_fields, parse_size
from diffaccel.whole_folder import check_writable

TRAINING = "training"  # folder of checkpoint and log, inside of the model's


def add_options(parser: terminal.Parser) -> None:
    """Add the options of training to the command's parser."""
    add = parser.add_argument_group("training (qvgen)").add_argument
    add("--data", metavar="SET|FOLDER|FILE", help="prompts (a packaged set or a file), which the model draws itself; "
        "pictures with captions; or encoded samples (.safetensors with x0 and prompts)")  # fmt: skip
    add("--preset", metavar="NAME", help="qvgen, paper, lsq, dsa or dsa+rank: settings to start from")
    add("--frames", type=int, metavar="N", help="of a video model")
    add("--seconds", type=float, metavar="S", help="stop after this time; the same command goes on")
    add("--seed", type=int, metavar="K", help="of noise and data (default 0)")
    add("--shard", action="store_true", default=None, help="split weights and moments among the processes of a launch")


def is_trained(name: str) -> bool:
    """Return whether a method trains."""
    return hasattr(registry.config_class(name), "trainer") if name in registry.names() else False


def config_of(options: argparse.Namespace, method_options: dict[str, dict[str, str]]) -> Any:
    """Return the config from a preset and options, and raise for options that do not go together."""
    cls = registry.config_class(options.method)
    for name in method_options:
        if name != cls.name:
            raise DiffAccelError(
                f"--{name}.{next(iter(method_options[name]))} is no option of '{cls.name}'. Write --{cls.name}.FIELD "
                "VALUE."
            )
    if options.data is None:
        raise DiffAccelError(
            f"--data is missing: '{cls.name}' is trained. Give prompts, a folder of pictures with captions, or encoded "
            "samples; without training, w4a16 and w4a8 have 4 bits."
        )
    if options.prompts is not None:
        raise DiffAccelError(f"--prompts is of mixdq; '{cls.name}' is trained on --data, which takes prompts as well.")
    if options.scan is not None or options.export != "diffusers":
        raise DiffAccelError(
            f"--scan and --export are of methods that are not trained; '{cls.name}' is. Leave them out."
        )
    if options.seconds is not None and not options.seconds > 0:
        raise DiffAccelError(f"--seconds is {options.seconds:g}; it must be above 0. Leave it out to make all steps.")
    if options.seed is not None and abs(options.seed) >= 2**62:
        raise DiffAccelError(f"--seed is {options.seed}; it must be from -2**62 to 2**62.")
    if options.steps is not None and (Path(options.data).suffix == ".safetensors" or Path(options.data).is_dir()):
        raise DiffAccelError(f"--steps is of drawings of prompts, and '{options.data}' has samples. Leave it out.")
    changes = parse_fields(cls, method_options.get(cls.name, {}))
    known = [field.name for field in dataclasses.fields(cls)]
    cls.from_dict({key: value for key, value in changes.items() if key not in known})  # names an unknown one
    return cls.preset(options.preset or cls.name, **changes)


def refuse_options(options: argparse.Namespace) -> None:
    """Raise for an option of training beside a method that is not trained."""
    for name in ("data", "preset", "frames", "seconds", "seed", "shard"):
        if getattr(options, name) is not None:
            raise DiffAccelError(
                f"--{name} is of methods that are trained, such as qvgen; '{options.method}' is not. Leave it out."
            )


def run_training(options: argparse.Namespace, config: Any) -> int:
    """Train, and save the model; return 4 where time was up before the last step."""
    _check_folder(options.out, options.overwrite)
    from diffaccel import families, processes
    from diffaccel.distill.teacher import PipelineTeacher
    from diffaccel.quant.qvgen.prepare import trainable
    from diffaccel.runs import loading
    from diffaccel.runs.call_arguments import call_arguments
    from diffaccel.runs.request import Request

    request = Request(
        model=options.model, prompts=("x",), size=parse_size(options.size), guidance=options.guidance,
        negative=options.negative, frames=options.frames, dtype=options.dtype, device=options.device,
    ).with_model_defaults()  # fmt: skip
    launch, device = processes.join(loading.pick_device(options.device))
    dtype = loading.pick_dtype(options.dtype, device)
    loading.quiet_libraries(True)
    pipe = loading.open_pipeline(request, loading.locate(options.model)[0], device, dtype)
    pipe.set_progress_bar_config(disable=True)
    if config.batch % launch.size:
        raise DiffAccelError(f"batch is {config.batch}, for {launch.size} processes. Take a multiple of them.")
    for network in families.networks(pipe):
        trainable(network, config)
    arguments = call_arguments(pipe, request)
    with alone(options.out / TRAINING, launch.rank):
        samples = _samples(options, pipe, arguments, launch)
        model = PipelineTeacher(pipe, samples.prompts, config.batch // launch.size, arguments)
        done = registry.training_function(type(config))(
            model, samples, config, options.out, name=options.model, seconds=options.seconds, seed=options.seed or 0,
            device=device, dtype=dtype, processes=launch, sharded=bool(options.shard), tell=terminal.write_note,
        )  # fmt: skip
    if launch.rank == 0:
        result = {"steps": done.step, "of": config.steps, "seconds": round(done.seconds, 1), "out": str(options.out)}
        if options.json:
            terminal.write_json({"method": config.to_dict(), **result})
        else:
            terminal.write(f"{done.step} of {config.steps} steps, {done.seconds:.0f} s")
            if done.finished:
                terminal.write(f"{options.model} by {config.name}: {options.out}")
    return 0 if done.finished else UNFINISHED


def _samples(options: argparse.Namespace, pipe: Any, arguments: dict[str, Any], launch: Any) -> Any:
    """Return the samples that ``--data`` names."""
    from diffaccel.eval.sets import prompts
    from diffaccel.quant.qvgen.data import drawn_samples, encoded_pictures, read_samples

    path = Path(options.data)
    if path.suffix == ".safetensors":
        return read_samples(path)
    if path.is_dir():
        return encoded_pictures(pipe, path, arguments)
    steps = {} if options.steps is None else {"num_inference_steps": options.steps}
    texts = prompts.read(options.data).texts
    return drawn_samples(
        pipe, texts, {**arguments, **steps}, options.out / TRAINING, batch=8, seed=options.seed or 0, processes=launch,
        tell=terminal.write_note,
    )  # fmt: skip


def _check_folder(out: Path, overwrite: bool) -> None:
    """Raise unless the folder can be written, and is empty or of such a run."""
    check_writable(out)
    if overwrite:
        raise DiffAccelError(
            "--overwrite is of methods that are not trained. Give another --out, or remove the folder."
        )
    if out.is_dir() and any(out.iterdir()) and not (out / TRAINING).is_dir():
        raise DiffAccelError(f"'{out}' is not empty, and holds no training that could go on. Give another --out.")

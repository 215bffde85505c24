"""The part of ``diffaccel quantize`` for methods that make a plan of the model first: prompts, folder, resuming."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel import terminal, zoo
from diffaccel.errors import DiffAccelError
from diffaccel.files import as_os_errors, remove_leftovers
from diffaccel.folder_lock import NAME, FolderLock
from diffaccel.runs.variant import parse_size
from diffaccel.whole_folder import check_writable, clear, unwritable

FOLDER, SAVED = "plan", "saved"  # of the work inside --out; the file that says that the model beside it is whole


def check_out(out: Path, overwrite: bool) -> None:
    """Raise unless the folder can be written, and is empty, or of a plan that was begun, or may be thrown away."""
    check_writable(out)
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if overwrite or not names - {NAME}:  # a kill before anything was written leaves the lock's file
        return
    if (out / FOLDER / SAVED).is_file():
        raise DiffAccelError(f"'{out}' has a finished model. Give another --out, or --overwrite to throw it away.")
    if not (out / FOLDER).is_dir():
        raise DiffAccelError(f"'{out}' is not empty. Give another --out, or --overwrite to throw it away.")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other runs from the folder, and name one that cannot be written."""
    lock = FolderLock(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        remove_leftovers(out / FOLDER, r"\w+\." + re.escape("json"))
        with as_os_errors():
            yield
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        lock.release()


def calibration_prompts(model: str, source: str | None, count: int) -> tuple[str, ...]:
    """Return what is drawn for a plan: the prompts of a file, or things that an embedded model knows.

    Raises:
        DiffAccelError: for another model without a file.
    """
    if source is not None:
        from diffaccel.eval.sets import prompts

        return prompts.read(source).texts
    vocabulary = zoo.vocabulary_of(model) if model in zoo.names() else None
    if vocabulary is None:
        raise DiffAccelError(f"--prompts is missing: what '{model}' is to draw. Give a file, one prompt a line.")
    labels, styles = vocabulary.all_labels, vocabulary.styles
    step = max(1, len(labels) // (count + len(styles)))
    pairs = [(label, styles[i % len(styles)]) for i, label in enumerate(labels[::step])]
    return tuple(f"{label}, {style}" for label, style in pairs if vocabulary.unseen_styles.get(label) != style)


def open_for_plan(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of the command, and the arguments of its calls."""
    from diffaccel.runs import loading
    from diffaccel.runs.call_arguments import call_arguments
    from diffaccel.runs.request import Request

    request = Request(
        model=options.model, prompts=("x",), size=parse_size(options.size), guidance=options.guidance,
        negative=options.negative, dtype=options.dtype, device=options.device,
    ).with_model_defaults()  # fmt: skip
    device = loading.pick_device(options.device)
    dtype = loading.pick_dtype(options.dtype, device)
    pipe = loading.open_pipeline(request, loading.locate(options.model)[0], device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call_arguments(pipe, request)


def make_plan(
    worker: Callable[..., Any], options: argparse.Namespace, config: Any, pipe: Any, texts: tuple[str, ...],
    arguments: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    """Make a plan of a pipeline, or go on with it; return the config with the plan, and the plan."""
    for name in ("num_inference_steps", "prompt", "generator", "output_type"):
        arguments.pop(name, None)
    folder = options.out / FOLDER

    def begin() -> None:
        if options.overwrite:
            (folder / SAVED).unlink(missing_ok=True)  # first: what is left by a kill is no finished model
            clear(options.out, keep=(NAME,))

    note = (lambda text: None) if options.json else terminal.write_note
    plan = worker(pipe, config, folder, texts, arguments, {"model": options.model}, note, begin)
    return replace(config, plan=str(folder / "plan.json")), plan

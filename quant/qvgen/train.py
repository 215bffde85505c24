"""From a pipeline and data to one with trained codes in a folder: the whole way, as the command line goes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.processes import Processes
from diffaccel.quant.qvgen.data import CleanSamples
from diffaccel.quant.qvgen.draws import FollowedModel
from diffaccel.quant.qvgen.options import TrainedQuantization
from diffaccel.quant.qvgen.run import QATRun
from diffaccel.quant.qvgen.sharded import ShardedQATRun
from diffaccel.training.loop import Deadline

TRAINING = "training"
PROVENANCE = "quantized.json"


def quantize_aware(
    model: FollowedModel,
    samples: CleanSamples,
    config: TrainedQuantization,
    folder: str | Path,
    *,
    name: str = "",
    seconds: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    processes: Processes | None = None,
    sharded: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> QATRun:
    """Train a pipeline's network with few bits, and save the pipeline with it; a run that is there goes on.

    The run's checkpoint and log lie in ``folder / "training"``; the pipeline is saved to ``folder`` when all steps are
    made.

    Args:
        model: of a pipeline, ``diffaccel.distill.PipelineTeacher``; its network is followed.
        samples: data with its prompts.
        name: of the model, for the record beside it.
        seconds: after which it stops; None for when all steps are made.
        sharded: split weights and moments among the processes, see :class:`ShardedQATRun`.
    """
    if seconds is not None and seconds <= 0:
        raise DiffAccelError(f"seconds is {seconds:g}; it must be above 0. Leave it out to make all steps.")
    pipe = getattr(model, "pipe", None)
    if pipe is None:
        raise DiffAccelError("A bare network has no pipeline to save. Use QATRun, and its result().")
    launch, folder = processes or Processes(), Path(folder)
    if samples.kind == "drawn" and config.recipe == "dsa":
        tell("note: recipe='dsa' follows data at clean levels, and this data was drawn by the model itself.")
    kind = ShardedQATRun if sharded else QATRun
    run = kind(
        model, samples, config, folder / TRAINING, seed=seed, device=device, dtype=dtype, processes=launch, tell=tell
    )
    run.run(None if seconds is None else Deadline(seconds))
    if run.finished and (sharded or launch.rank == 0):  # all processes have a part of the weights of a sharded run
        trained = quantized_pipeline(run, pipe)
    if launch.rank == 0 and run.finished:
        trained.save_pretrained(folder)
        values = {"model": name or type(pipe).__name__, "model_weights": weights_hash(model.network), "seed": seed,
                  "options": config.to_dict(), "samples": len(samples.prompts), "data": samples.kind,
                  "seconds": round(run.seconds, 1), "versions": record.versions()}  # fmt: skip
        write_json(folder / PROVENANCE, values)
    launch.wait()
    return run


def quantized_pipeline(run: QATRun, pipe: Any) -> Any:
    """Return a pipeline with the trained network, and everything else shared with the one that was followed."""
    key = next(key for key, part in pipe.components.items() if part is run.model.network)
    parts = {**pipe.components, key: run.result()}
    known = inspect.signature(type(pipe).__init__).parameters
    switches = {name: value for name, value in pipe.config.items() if name in known and name not in parts}
    return type(pipe)(**parts, **switches)

"""Checkpoints of quantization-aware training: everything that a run needs to go on to the same bits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.quant.qvgen.data import CleanSamples
from diffaccel.quant.qvgen.draws import FollowedModel
from diffaccel.quant.qvgen.optimizer import QATOptimizer, grouped
from diffaccel.quant.qvgen.options import TrainedQuantization
from diffaccel.quant.qvgen.prepare import fake_layers
from diffaccel.training.checkpoint import load_checkpoint, save_tensors

VERSION = "qat-1"


@dataclass(frozen=True)
class Origin:
    """What a run must have in common with its checkpoint."""

    options: dict[str, Any]
    weights: str
    call: dict[str, Any]
    data: str

    @classmethod
    def of(
        cls, model: FollowedModel, samples: CleanSamples, config: TrainedQuantization, seed: int, dtype: torch.dtype
    ) -> Origin:
        """Describe a run."""
        options = json.loads(json.dumps({**config.run_options(), "seed": seed, "dtype": str(dtype)}))
        call = json.loads(json.dumps(model.identity))
        return cls(options, weights_hash(model.network), call, samples.identity)

    def difference(self, other: dict[str, Any]) -> str:
        """Return what a checkpoint is of instead of this run, in words; nothing where it is of this run."""
        options = other.get("options", {})
        if differing := [key for key, value in self.options.items() if options.get(key) != value]:
            return f"other options ({', '.join(differing)})"
        if other.get("weights") != self.weights:
            return "another model, or of one with other weights"
        if other.get("data") != self.data:
            return "other data"
        return "a model that is asked in another way" if other.get("call") != self.call else ""


def save(path: Path, student: nn.Module, optimizer: QATOptimizer, origin: Origin, step: int, seconds: float) -> None:
    """Write a checkpoint, atomically."""
    tensors: dict[str, Tensor] = {}
    for group in grouped(student).values():
        for name, p in group.items():
            tensors[f"live.{name}"] = p.detach()
            for key, value in optimizer.adam.state.get(p, {}).items():
                tensors[f"moment.{name}.{key}"] = torch.as_tensor(value)
    state = {"version": VERSION, "step": step, "seconds": seconds, **asdict(origin)}
    save_tensors(tensors, path, {"state": json.dumps(state)})


@torch.no_grad()
def load(
    path: Path, student: nn.Module, optimizer: QATOptimizer, origin: Origin, device: torch.device
) -> tuple[int, float]:
    """Fill student and optimiser from a checkpoint, and return its step and seconds.

    Raises:
        DiffAccelError: for a checkpoint of another run, and a file that is none.
    """
    tensors, state = load_checkpoint(path, device)
    step, seconds = _counters(state, path)
    reason = origin.difference(state) if state.get("version") == VERSION else "no run of this version"
    if reason:
        raise DiffAccelError(f"'{path}' is of {reason}. Take another folder, or remove the file.")
    for name, layer in fake_layers(student):
        sides = (tensors.get(f"live.{name}.side_left"), tensors.get(f"live.{name}.side_right"))
        layer.set_side(*sides)
    optimizer.renew()
    is_fused = bool(optimizer.adam.defaults.get("fused"))
    for group in grouped(student).values():
        for name, p in group.items():
            live = tensors.get(f"live.{name}")
            if live is None or live.shape != p.shape:
                raise DiffAccelError(
                    f"'{path}' is damaged: the weight '{name}' is missing or has another shape. Remove it to begin "
                    "anew, or take another folder."
                )
            p.copy_(live)
            prefix = f"moment.{name}."
            moments = {key: tensors[f"{prefix}{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                       if f"{prefix}{key}" in tensors}  # fmt: skip
            if moments:
                moments["step"] = moments["step"] if is_fused else moments["step"].cpu()
                optimizer.adam.state[p] = moments
    return step, seconds


def _counters(state: dict[str, Any], path: Path) -> tuple[int, float]:
    """Return step and seconds of a checkpoint's state."""
    step, seconds = state.get("step", 0), state.get("seconds", 0.0)
    if not (isinstance(state.get("options", {}), dict) and isinstance(step, int) and isinstance(seconds, int | float)):
        raise DiffAccelError(
            f"'{path}' is no whole checkpoint (its state is no description of a run). Remove it to begin anew, or take "
            "another folder."
        )
    return step, float(seconds)

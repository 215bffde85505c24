"""Checkpoints of a training run: safetensors files with the state in their metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from diffaccel.files import atomic

STATE_VERSION = "1"


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata))


def save_weights(weights: dict[str, torch.Tensor], path: Path, *, step: int, samples: int, seconds: float) -> None:
    """Write a checkpoint of finished weights, live and averaged alike; a ``TrainingRun`` resumes it with a warm-up."""
    tensors = {f"{kind}.{name}": value.float().clone() for kind in ("live", "ema") for name, value in weights.items()}
    state = {"step": step, "samples": samples, "seconds": seconds, "updates": step, "restarted_at": None}
    save_tensors(tensors, path, {"state": json.dumps({"version": STATE_VERSION, **state})})

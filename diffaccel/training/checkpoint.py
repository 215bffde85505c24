"""Checkpoints of a training run: safetensors files with the state, and a digest of the file, in their metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.files import atomic

STATE_VERSION = "1"
_FIELD = b'"digest":"%s"'
_BLANK = b"0" * 64  # in the place of the digest while the file is hashed
_ADVICE = "Remove it to begin anew, or take another folder"
_CHUNK = 1 << 24  # bytes that are hashed at a time


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; its metadata has the SHA-256 of the file whose ``digest`` is zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = memoryview(save(whole, metadata={**metadata, "digest": _BLANK.decode()}))
    head_size = 8 + int.from_bytes(data[:8], "little")
    head, body = bytes(data[:head_size]), data[head_size:]
    digest = hashlib.sha256(head)
    digest.update(body)
    with atomic(path) as file:
        file.write(head.replace(_FIELD % _BLANK, _FIELD % digest.hexdigest().encode()))
        file.write(body)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file of :func:`save_tensors`.

    A file without a digest, which older versions wrote, is read as it is.

    Raises:
        DiffAccelError: for a file whose content is not that of its digest.
        SafetensorError: for a file that is cut off, or none.
        OSError: for one that cannot be opened.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    digest = metadata.pop("digest", None)
    with open(path, "rb") as stream:
        if digest is not None and _digest(stream, digest) != digest:
            raise DiffAccelError(
                f"'{path}' is damaged, or was changed since it was written: its content has not the SHA-256 that it "
                f"tells. {_ADVICE}."
            )
    return tensors, metadata


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint and the state that its metadata holds.

    Raises:
        DiffAccelError: for a file that is damaged, cut off or no checkpoint.
    """
    try:
        tensors, metadata = load_tensors(path, device)
        state = json.loads(metadata.get("state", "{}"))
        if not isinstance(state, dict):
            raise ValueError("its state is no description of a run")
    except DiffAccelError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise DiffAccelError(f"'{path}' is no whole checkpoint ({first_line(error, 90)}). {_ADVICE}.") from error
    return tensors, state


def check_counters(path: Path, state: dict[str, Any], counters: Mapping[str, int | None]) -> None:
    """Raise for a state of a checkpoint with other counters than whole numbers up to these, or without a time."""
    for name, most in {**counters, "seconds": None}.items():
        value, kinds = state[name], (int, float) if name == "seconds" else (int,)
        if type(value) not in kinds or not 0 <= value < math.inf or (most is not None and value > most):
            raise DiffAccelError(f"'{path}' is damaged: its {name} is {value!r}. {_ADVICE}.")


def _digest(file: BinaryIO, digest: str) -> str:
    """Return the SHA-256 of a file, the digits of the one that it tells as zeros."""
    size = file.read(8)
    head = size + file.read(int.from_bytes(size, "little"))
    hashed = hashlib.sha256(head.replace(_FIELD % digest.encode(), _FIELD % _BLANK))
    while chunk := file.read(_CHUNK):
        hashed.update(chunk)
    return hashed.hexdigest()


def save_weights(weights: dict[str, torch.Tensor], path: Path, *, step: int, samples: int, seconds: float) -> None:
    """Write a checkpoint of finished weights, live and averaged alike; a ``TrainingRun`` resumes it with a warm-up."""
    tensors = {f"{kind}.{name}": value.float().clone() for kind in ("live", "ema") for name, value in weights.items()}
    state = {"step": step, "samples": samples, "seconds": seconds, "updates": step, "restarted_at": None}
    save_tensors(tensors, path, {"state": json.dumps({"version": STATE_VERSION, **state})})


def averages(path: Path, module: str) -> dict[str, torch.Tensor]:
    """Return the averaged weights of one module of a checkpoint, by its own names.

    Args:
        module: its name in the run, with a dot: ``"network."``.
    """
    whole = f"ema.{module}"
    return {name[len(whole) :]: value for name, value in load_file(path).items() if name.startswith(whole)}

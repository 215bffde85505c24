"""Latents of the particles that a search still starts from, in one file that is replaced as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffaccel.files import COUNT, atomic, misfit

NAME = "latents.safetensors"
_KEY = "diffaccel"
_ABOUT = {"rounds": COUNT, "log": str, "keep": (COUNT, None)}


@dataclass(frozen=True)
class StoredLatents:
    """Latents after so many rounds of a search.

    Attributes:
        rounds: number of rounds whose rewards led to them.
        log: digest of the log of these rounds.
        numbers: of the particles, rising.
        tensors: their rows of every tensor of the pool, on the CPU.
        keep: where the search has ended and only its samples are here: how many beside the best; else None.
    """

    rounds: int
    log: str
    numbers: list[int]
    tensors: list[Tensor]
    keep: int | None = None

    def write(self, folder: Path) -> None:
        """Write the file of a search's folder. The same latents give the same bytes."""
        from safetensors.torch import save

        about = json.dumps({"rounds": self.rounds, "log": self.log, "keep": self.keep})
        named = {f"tensor{i}": tensor.contiguous() for i, tensor in enumerate(self.tensors)}
        numbers = torch.tensor(self.numbers, dtype=torch.int64, device="cpu")
        with atomic(folder / NAME) as file:
            file.write(save({"numbers": numbers, **named}, metadata={_KEY: about}))


def read(folder: Path) -> StoredLatents | None:
    """Read the file of a search's folder; None where there is none, or a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / NAME, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            tensors = [file.get_tensor(f"tensor{i}") for i in range(len(file.keys()) - 1)]
            numbers = file.get_tensor("numbers").tolist()
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    if misfit(about, _ABOUT) or not tensors or any(len(tensor) != len(numbers) for tensor in tensors):
        return None
    return StoredLatents(about["rounds"], about["log"], numbers, tensors, about["keep"])

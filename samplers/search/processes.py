"""Processes that share one search: each predicts and scores its part of every round, and all receive the whole.

Every process runs the same policies on the same rewards, which are gathered to the bit, so all take the same decisions.
A round is cut at multiples of the rows of a network call, so that with a fixed number of rows the calls are the same
for any number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from diffaccel.processes import Processes


@dataclass(frozen=True)
class SearchProcesses(Processes):
    """The processes that share one search, and how its rounds are cut among them; one by default."""

    @classmethod
    def of_launch(cls, device: torch.device) -> Self:
        """Return all processes of an ``accelerate launch`` whose pipelines are on such a device."""
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")  # without the flag it does not join the others on a CPU
        return cls(state.process_index, state.num_processes, state)

    def part(self, count: int, rows: int) -> slice:
        """Return which of ``count`` rows are this process's, in network calls of ``rows``."""
        return self._part(self.rank, count, rows)

    def _part(self, rank: int, count: int, rows: int) -> slice:
        if self.size == 1:
            return slice(0, count)
        rows = min(rows, math.ceil(count / self.size))
        calls = math.ceil(count / rows)
        return slice(rank * calls // self.size * rows, min((rank + 1) * calls // self.size * rows, count))

    def gather(self, tensors: list[Tensor], count: int, rows: int) -> list[Tensor]:
        """Gather tensors of one shape, whose first axis is all ``count`` rows, from this process's parts of them."""
        if self.size == 1:
            return tensors
        return list(self._gather(torch.stack(tensors, 1), count, rows).unbind(1))

    def gather_numbers(self, numbers: list[float], device: torch.device, count: int, rows: int) -> list[float]:
        """Gather one number for each of the ``count`` rows from those of this process's part."""
        if self.size == 1:
            return numbers
        return self._gather(torch.tensor(numbers, dtype=torch.float64, device=device), count, rows).tolist()

    def _gather(self, own: Tensor, count: int, rows: int) -> Tensor:
        """Pad the parts to one length, as the collective requires, gather them and cut the padding off."""
        from accelerate.utils import gather

        parts = [self._part(rank, count, rows) for rank in range(self.size)]
        longest = max(part.stop - part.start for part in parts)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        gathered = gather(padded)
        starts = [i * longest for i in range(self.size)]
        return torch.cat([gathered[s : s + part.stop - part.start] for s, part in zip(starts, parts, strict=True)])

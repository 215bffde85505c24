"""Processes that work on one search: each predicts and scores its part of every round, and all see all of it.

Every process runs the same policies on the same rewards, so nothing is decided twice differently: what is gathered is
the same to the bit everywhere. Rounds are cut at multiples of the rows of a network call, so that with a fixed number
of rows no number of processes changes a call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's place among those that share a search; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_launch(cls, device: torch.device) -> Processes:
        """All of an ``accelerate launch``, whose pipelines are on such a device."""
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")  # without a GPU it would not join the others by itself
        return cls(state.process_index, state.num_processes)

    def share(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def part(self, count: int, rows: int) -> slice:
        """Which of ``count`` rows are this process's."""
        return self._part(self.rank, count, rows)

    def _part(self, rank: int, count: int, rows: int) -> slice:
        if self.size == 1:
            return slice(0, count)
        rows = min(rows, math.ceil(count / self.size))
        calls = math.ceil(count / rows)
        return slice(rank * calls // self.size * rows, min((rank + 1) * calls // self.size * rows, count))

    def gather(self, x: Tensor, v: Tensor, count: int, rows: int) -> tuple[Tensor, Tensor]:
        """Latents and velocities of all ``count`` rows."""
        if self.size == 1:
            return x, v
        both = self._gather(torch.stack([x, v], 1), count, rows)
        return both[:, 0], both[:, 1]

    def gather_numbers(self, numbers: list[float], device: torch.device, count: int, rows: int) -> list[float]:
        """A number a row, of all ``count`` rows."""
        if self.size == 1:
            return numbers
        return self._gather(torch.tensor(numbers, dtype=torch.float64, device=device), count, rows).tolist()

    def _gather(self, mine: Tensor, count: int, rows: int) -> Tensor:
        """Parts differ in length, and what is sent must not: they are padded, and cut again."""
        from accelerate.utils import gather

        parts = [self._part(rank, count, rows) for rank in range(self.size)]
        longest = max(part.stop - part.start for part in parts)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        sent = gather(padded)
        return torch.cat([sent[i * longest : i * longest + part.stop - part.start] for i, part in enumerate(parts)])

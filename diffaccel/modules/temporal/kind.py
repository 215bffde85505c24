"""One kind of network call: its program, the fixed memory of its features, and its tables by conditions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from diffaccel.modules.temporal.arguments import bytes_of
from diffaccel.modules.temporal.generation import is_waited_for
from diffaccel.modules.temporal.program import FEW, Program, numbers_in
from diffaccel.modules.temporal.table import Block, FixedRow, Layout
from diffaccel.modules.temporal.trace import Ref

Evaluate = Callable[[Program, dict[str, Tensor], list[Tensor], torch.device], list[dict[int, Tensor]]]
MOST_VALUES = 16  # different timesteps among the tokens of a call


class TooMany(Exception):
    """Says why the features of a call cannot be rows."""


class Kind:
    """Tables of one kind of call.

    Args:
        keep: maximum number of blocks: sets of conditions.

    Attributes:
        results: by name of the replaced module: what its calls return, which reads the fixed memory.
        reads: number of network calls whose timestep the host waited for.
        computed: number of rows computed.
    """

    def __init__(self, key: Hashable, program: Program, time: Tensor, device: torch.device, keep: int) -> None:
        self.key, self.program, self.device, self.keep = key, program, device, keep
        units = time.numel() if time.numel() > FEW and time.ndim > 1 else 1
        if units > 1:
            _check_rows(program, units)
        self.layout = Layout(program.shapes, units, bytes_of(time).numel() // units)
        self.stage = FixedRow(self.layout, device)
        self.blocks: OrderedDict[bytes, Block] = OrderedDict()
        self.results = {name: self._result(result) for name, result in program.modules.items()}
        self.reads = self.computed = 0

    def _result(self, result: Any) -> Any:
        if isinstance(result, Ref):
            return self.stage.features[result.number]
        if isinstance(result, dict):
            return {name: self._result(item) for name, item in result.items()}
        if isinstance(result, list | tuple):
            return type(result)(self._result(item) for item in result)
        return result

    @property
    def memory(self) -> int:
        """Bytes of all tables and of the fixed memory."""
        return self.stage.memory + sum(block.memory for block in self.blocks.values())

    def block(self, digest: bytes) -> Block:
        """Return the block of conditions, a new one where they are new; the one that was not used for longest goes."""
        if digest not in self.blocks:
            while len(self.blocks) >= self.keep:
                self.blocks.popitem(last=False)
            self.blocks[digest] = Block(self.layout, self.device)
        self.blocks.move_to_end(digest)
        return self.blocks[digest]

    def keys_on_host(self, time: Tensor) -> list[bytes]:
        """Return the different keys of a timestep; the host waits for the device."""
        keys = self.layout.keys_of(time)
        self.reads += is_waited_for(keys)
        if self.layout.units > 1:
            keys = torch.unique(keys, dim=0)
            if len(keys) > MOST_VALUES:
                raise TooMany(f"its tokens have {len(keys)} different timesteps")
        return [row.tobytes() for row in keys.cpu().numpy()]

    def stage_rows(self, block: Block, time: Tensor) -> Tensor:
        """Copy the rows of a timestep to the fixed memory; return on the device whether they were found."""
        rows, is_found = block.find(self.layout.keys_of(time).to(self.device))
        self.stage.take(block, rows)
        return is_found

    def insert(self, block: Block, tensors: dict[str, Tensor], times: list[Tensor], evaluate: Evaluate) -> None:
        """Compute the rows of timesteps that a block does not have.

        Raises:
            TooMany: tokens of equal timesteps have different features.
        """
        new: dict[bytes, Tensor] = {}
        for time in times:
            keys = self.keys_on_host(time)
            if any(key not in block.index and key not in new for key in keys):
                new |= dict.fromkeys(keys, time)
        distinct = list({id(time): time for time in new.values()}.values())
        together = max(1, len(distinct)) if self.layout.units == 1 else 1  # features of tokens are large
        for start in range(0, len(distinct), together):
            part = distinct[start : start + together]
            for features, time in zip(evaluate(self.program, tensors, part, self.device), part, strict=True):
                keys, rows = self._rows(features, time)
                chosen = [i for i, key in enumerate(keys) if key not in block.index]
                if chosen:
                    block.insert([keys[i] for i in chosen], rows[chosen])
                    self.computed += len(chosen)

    def _rows(self, features: dict[int, Tensor], time: Tensor) -> tuple[list[bytes], Tensor]:
        keys = self.layout.keys_of(time)
        if self.layout.units == 1:
            return [keys.cpu().numpy().tobytes()], self.layout.rows_of(features)
        values, inverse = torch.unique(keys, dim=0, return_inverse=True)
        first = torch.stack([(inverse == i).to(torch.uint8).argmax() for i in range(len(values))]).to(self.device)
        rows = torch.zeros((len(values), self.layout.row_bytes), dtype=torch.uint8, device=self.device)
        for number, slot in self.layout.slots.items():
            of_tokens = bytes_of(features[number]).view(self.layout.units, slot.bytes)
            part = of_tokens.index_select(0, first)
            if not torch.equal(part.index_select(0, inverse.to(self.device)), of_tokens):
                raise TooMany("tokens of equal timesteps have different features")
            rows[:, slot.offset : slot.offset + slot.bytes] = part
        return [row.tobytes() for row in values.cpu().numpy()], rows


def _check_rows(program: Program, units: int) -> None:
    """Raise where a feature has no row for each token."""
    for number in {number for result in program.modules.values() for number in numbers_in(result)}:
        size = program.shapes[number].size
        if units not in (size[0], size[0] * (size[1] if len(size) > 1 else 1)):
            raise TooMany(f"a feature of {units} tokens has the shape {size}")

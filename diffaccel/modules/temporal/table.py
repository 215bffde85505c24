"""Tables of temporal features: rows of bytes with the bits of their timestep as key, and fixed memory for one row.

The network reads its features from the fixed memory, whose addresses never change, so that graphs and compiled code
that read it stay valid; a row is copied there before each network call. Rows are found on the device by the bits of the
timestep, without the host waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.modules.temporal.arguments import bytes_of
from diffaccel.modules.temporal.trace import Shape

ALIGNMENT = 256  # bytes; what torch's allocator gives


@dataclass(frozen=True, eq=False)
class FeatureSlot:
    """Where one feature lies in a row.

    Attributes:
        offset, bytes: of its part of a row.
        shape: of the feature in a network call.
    """

    offset: int
    bytes: int
    shape: Shape


class Layout:
    """The places of features in a row.

    Args:
        shapes: of the features, by number.
        units: 1 where a row holds the features of a whole call, else the number of tokens, each with a row of its own.
        key_bytes: bytes of one key: the timestep of the call, or of a token.
    """

    def __init__(self, shapes: dict[int, Shape], units: int, key_bytes: int) -> None:
        self.units, self.key_bytes, self.slots = units, key_bytes, dict[int, FeatureSlot]()
        end = 0
        for number, shape in shapes.items():
            size = shape.bytes // units
            self.slots[number] = FeatureSlot(end, size, shape)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.row_bytes = end

    def keys_of(self, time: Tensor) -> Tensor:
        """Return the bits of a timestep, ``(units, key bytes)``, on its device."""
        return bytes_of(time).reshape(self.units, self.key_bytes)

    def rows_of(self, features: dict[int, Tensor]) -> Tensor:
        """Return features as rows of bytes, ``(units, row bytes)``."""
        first = next(iter(features.values()))
        rows = torch.zeros((self.units, self.row_bytes), dtype=torch.uint8, device=first.device)
        for number, slot in self.slots.items():
            feature = features[number]
            source = bytes_of(_dense(feature) if self.units == 1 else feature).view(self.units, slot.bytes)
            rows[:, slot.offset : slot.offset + slot.bytes] = source
        return rows


class FixedRow:
    """The fixed memory of the features that the network reads.

    Attributes:
        features: by number, in the shapes and strides that the network had without a table.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        with torch.inference_mode(False):
            if layout.units == 1:
                self._row = torch.zeros((1, layout.row_bytes), dtype=torch.uint8, device=device)
                places = {n: self._row[0, s.offset : s.offset + s.bytes] for n, s in layout.slots.items()}
            else:
                places = {
                    n: torch.zeros(s.bytes * layout.units, dtype=torch.uint8, device=device)
                    for n, s in layout.slots.items()
                }
            self._places = places
            self.features = {n: _as(places[n], slot.shape, layout.units) for n, slot in layout.slots.items()}

    @property
    def memory(self) -> int:
        """Bytes of the memory."""
        return sum(place.numel() for place in self._places.values())

    def take(self, block: Block, rows: Tensor) -> None:
        """Copy rows of a block, one for each unit, on the device."""
        if self.layout.units == 1:
            torch.index_select(block.rows, 0, rows, out=self._row)
            return
        for number, slot in self.layout.slots.items():
            part = block.rows[:, slot.offset : slot.offset + slot.bytes]
            self._places[number].view(-1, slot.bytes).copy_(part.index_select(0, rows))

    def take_row(self, block: Block, row: int) -> None:
        """Copy one row, whose number the host knows."""
        self._row.copy_(block.rows[row : row + 1])


class Block:
    """The rows of one set of conditions.

    Attributes:
        rows: ``(capacity, row bytes)``; keys: ``(capacity, key bytes)``; both of uint8 on the device.
        index: number of the row of each key, known to the host.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.index = layout, dict[bytes, int]()
        with torch.inference_mode(False):
            self.rows = torch.empty((0, layout.row_bytes), dtype=torch.uint8, device=device)
            self.keys = torch.empty((0, layout.key_bytes), dtype=torch.uint8, device=device)

    @property
    def memory(self) -> int:
        """Bytes of rows and keys."""
        return self.rows.numel() + self.keys.numel()

    def insert(self, keys: list[bytes], rows: Tensor) -> None:
        """Append rows; the oldest stay at their numbers.

        Args:
            keys: new ones, one for each row.
        """
        new_keys = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
        start = len(self.index)
        with torch.inference_mode(False):
            if start + len(keys) > len(self.rows):
                self._grow(max(start + len(keys), 2 * len(self.rows) if start else 0))
        self.rows[start : start + len(keys)] = rows
        self.keys[start : start + len(keys)] = new_keys.to(self.keys.device)
        self.index.update(zip(keys, range(start, start + len(keys)), strict=True))

    def _grow(self, capacity: int) -> None:
        for name in ("rows", "keys"):
            before: Tensor = getattr(self, name)
            grown = torch.zeros((capacity, before.shape[1]), dtype=torch.uint8, device=before.device)
            grown[: len(before)] = before
            setattr(self, name, grown)

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of each key ``(units, key bytes)``, and whether all are there: both on the device."""
        held = self.keys[: len(self.index)]
        hits = (keys.unsqueeze(1) == held).all(dim=2)  # (units, rows)
        return hits.to(torch.uint8).argmax(dim=1), hits.any(dim=1).all()


def _dense(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor in the order of its memory, where that has no gaps; else in row-major order."""
    order = sorted(range(tensor.ndim), key=lambda axis: tensor.stride(axis), reverse=True)
    return tensor.permute(order) if _is_dense(tuple(tensor.shape), tuple(tensor.stride())) else tensor


def _as(place: Tensor, shape: Shape, units: int) -> Tensor:
    """Return bytes as a tensor of a shape, with its strides where these leave no gaps; rows of tokens in order."""
    flat = place.view(shape.dtype)
    if units > 1 or not _is_dense(shape.size, shape.stride):
        return flat.view(shape.size)
    return flat.as_strided(shape.size, shape.stride, flat.storage_offset())


def _is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for step, length in sorted(zip(stride, size, strict=True)):
        if length != 1 and step != expected:
            return False
        expected *= length
    return math.prod(size) > 0

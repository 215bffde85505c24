"""Calibration: the range of every planned layer's input, and whether the text states begin with a constant row."""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.mixdq.candidates import LayerToPlan
from diffaccel.quant.mixed.form import InputRange

Running = Literal["minmax", "ema"]
_MOMENTUM = 0.95
_CLOSE = 1e-3


@dataclass
class InputStatistics:
    """Running statistics of one layer's input.

    Attributes:
        shape: of the first input; its first dimension is the batch.
        low, high: of each range of channels, fp32; without the first and the empty rows where the input may be text.
        whole: lowest and highest value with all rows.
        first: the first row of the text states that was met, fp32 ``(K,)``.
        is_constant: whether all first rows, empty ones aside, were equal to it; a tensor.
        largest: largest magnitude of first rows and of the others.
    """

    candidate: LayerToPlan
    running: Running
    shape: tuple[int, ...] = ()
    low: Tensor | None = None
    high: Tensor | None = None
    whole: tuple[Tensor, Tensor] | None = None
    first: Tensor | None = None
    is_constant: Tensor | None = None
    largest: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take one input in."""
        x: Tensor = args[0].detach().float()
        self.shape = self.shape or tuple(x.shape)
        if self.candidate.reads_text and x.ndim == 3 and x.shape[1] > 1:
            self._add_text(x)
            self.whole = _merged(self.whole, (x.amin(), x.amax()), self.running)
            x = x[:, 1:]
        split = self.candidate.split
        parts = (x[:, :split], x[:, split:]) if split else (x,)
        low, high = torch.stack([p.amin() for p in parts]), torch.stack([p.amax() for p in parts])
        both = _merged(
            None if self.low is None or self.high is None else (self.low, self.high), (low, high), self.running
        )
        self.low, self.high = both

    def _add_text(self, x: Tensor) -> None:
        rows = x[:, 0]
        filled = rows.abs().amax(dim=1, keepdim=True) > 0  # empty ones are all zeros
        if self.first is None and bool(filled.any()):
            self.first = rows[filled.flatten().float().argmax()].clone()
            self.is_constant = torch.ones((), dtype=torch.bool, device=x.device)
        if self.first is None or self.is_constant is None:
            return
        far = ((rows - self.first).abs() > _CLOSE * self.first.abs().amax()) & filled
        self.is_constant = self.is_constant & ~far.any()
        now = (rows.abs().amax(), x[:, 1:].abs().amax())
        before = self.largest or now
        self.largest = (torch.maximum(before[0], now[0]), torch.maximum(before[1], now[1]))


def _merged(before: Any, now: tuple[Tensor, Tensor], running: Running) -> tuple[Tensor, Tensor]:
    if before is None:
        return now
    if running == "ema":
        return tuple(_MOMENTUM * old + (1 - _MOMENTUM) * new for old, new in zip(before, now, strict=True))
    return torch.minimum(before[0], now[0]), torch.maximum(before[1], now[1])


@dataclass(frozen=True)
class CalibratedRanges:
    """The result of a calibration.

    Attributes:
        ranges: of the layers that were called, by name.
        shapes: of their inputs.
        first_row: constant first row of the text states; None where there is none.
        readers: layers whose input has it.
        rows: largest magnitude of first rows and of all others, where the layers read text.
    """

    ranges: dict[str, InputRange]
    shapes: dict[str, tuple[int, ...]]
    first_row: Tensor | None = None
    readers: frozenset[str] = frozenset()
    rows: tuple[float, float] | None = None

    def known(self, name: str) -> InputRange:
        """Return what is known of a layer's input, its constant row included."""
        plain = self.ranges[name]
        return InputRange(plain.low, plain.high, self.first_row) if name in self.readers else plain

    def elements(self, name: str) -> int:
        """Return the numbers of a layer's input for one sample."""
        return math.prod(self.shapes[name][1:])

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        row = None
        if self.first_row is not None:
            row = base64.b64encode(self.first_row.cpu().float().numpy().tobytes()).decode()
        return {
            "layers": {n: [list(r.low), list(r.high), list(self.shapes[n])] for n, r in self.ranges.items()},
            "first_row": row, "readers": sorted(self.readers), "rows": self.rows,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibratedRanges:
        """Invert :meth:`to_dict`."""
        row = values["first_row"]
        first = None if row is None else torch.from_numpy(np.frombuffer(base64.b64decode(row), np.float32).copy())
        ranges = {n: InputRange(tuple(low), tuple(high)) for n, (low, high, _) in values["layers"].items()}
        shapes = {n: tuple(shape) for n, (_, _, shape) in values["layers"].items()}
        rows = None if values["rows"] is None else (values["rows"][0], values["rows"][1])
        return cls(ranges, shapes, first, frozenset(values["readers"]), rows)


@dataclass
class Recorder:
    """Watches the inputs of layers while the pipeline draws."""

    layers: dict[str, LayerToPlan]
    running: Running = "minmax"
    bos: bool = True
    statistics: dict[str, InputStatistics] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch in the block."""
        self.statistics = {name: InputStatistics(layer, self.running) for name, layer in self.layers.items()}
        hooks = [
            layer.module.register_forward_pre_hook(self.statistics[name].add) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def result(self) -> CalibratedRanges:
        """Return the ranges.

        Raises:
            DiffAccelError: for an input that is not finite, and where no layer was called.
        """
        called = {name: s for name, s in self.statistics.items() if s.low is not None}
        if not called:
            raise DiffAccelError("The pipeline's call called no planned layer of the network. Check its arguments.")
        ranges, readers, first, rows = {}, set(), None, None
        for name, seen in called.items():
            low, high = _numbers(seen.low), _numbers(seen.high)
            if seen.first is not None:
                rows = rows or tuple(map(float, seen.largest or ()))
                is_same = first is None or torch.equal(first, seen.first.cpu())
                if self.bos and bool(seen.is_constant) and bool(seen.first.any()) and is_same:
                    first = seen.first.cpu()
                    readers.add(name)
                else:
                    low, high = _numbers(seen.whole and seen.whole[0]), _numbers(seen.whole and seen.whole[1])
            if not all(map(math.isfinite, (*low, *high))):
                raise DiffAccelError(
                    f"The input of '{name}' holds infinities or not-a-numbers in the plain network. Load the model in "
                    "bfloat16 or float32, or check it."
                )
            ranges[name] = InputRange(low, high)
        shapes = {name: seen.shape for name, seen in called.items()}
        return CalibratedRanges(ranges, shapes, first, frozenset(readers), rows or None)  # type: ignore[arg-type]


def _numbers(values: Tensor | None) -> tuple[float, ...]:
    return () if values is None else tuple(float(value) for value in values.reshape(-1))

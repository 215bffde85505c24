"""Sensitivity: what the picture, or the network's output, loses where one layer alone has fewer bits.

Content layers are measured by the similarity of the drawn pictures to the plain network's, all others by the ratio of
signal and noise of the network's output at the plain network's inputs, in dB (arXiv 2405.17873, section 4.2). One
record a layer and number of bits, appended to a file, so that a run that is killed goes on behind the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.files import NUMBER, misfit
from diffaccel.quant.mixdq.candidates import LayerToPlan
from diffaccel.quant.mixdq.drawings import Drawings, RecordedCalls
from diffaccel.quant.mixdq.plan_file import PlannedLayer
from diffaccel.quant.mixdq.similarity import mean_similarity
from diffaccel.quant.mixdq.simulate import Bench

Kind = Literal["weight", "activation"]


class RecordFile:
    """Numbers by a key, one JSON line each; a line that a kill has cut is left out and written again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, float] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        for number, line in enumerate(whole, start=1):
            try:
                key, value = _entry(json.loads(line))
                self.values[key] = value
            except (ValueError, KeyError, TypeError) as error:
                raise DiffAccelError(
                    f"Line {number} of '{path}' is damaged ({first_line(error, 80)}). Remove the line, and its number "
                    "is measured again."
                ) from error
        if len(whole) < len(lines):
            with open(path, "r+b") as file:
                file.truncate(sum(map(len, whole)))

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """Return the number of a key, measured where it is not known."""
        if key not in self.values:
            value = float(measure())
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value, "check": _check(key, value)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.values[key] = value
        return self.values[key]


def _check(key: str, value: float) -> str:
    return hashlib.sha256(f"{key} {value!r}".encode()).hexdigest()[:8]


def _entry(entry: Any) -> tuple[str, float]:
    """Return key and number of a line, and raise ``ValueError`` for one that is not as it was written."""
    if wrong := misfit(entry, {"key": str, "value": NUMBER, "check?": str}):
        raise ValueError(f"{wrong} is missing or of another kind")
    key, value = entry["key"], float(entry["value"])
    if entry.get("check", _check(key, value)) != _check(key, value):  # lines of earlier versions have none
        raise ValueError("it was changed since it was written")
    return key, value


@dataclass
class Probe:
    """The plain network's pictures and calls on the probed prompts, to which others are compared."""

    pipe: Any
    network: Any
    drawings: Drawings
    count: int
    window: int

    def __post_init__(self) -> None:
        self.calls = RecordedCalls()
        with self.calls.recording(self.network):
            self.pictures = self.drawings.draw(self.pipe, self.count)

    def similarity(self) -> float:
        """Return the mean similarity of the pictures that are drawn now to the plain ones."""
        return mean_similarity(self._drawn(), self.pictures, self.window)

    def squared_error(self) -> float:
        """Return the mean squared error of the pictures that are drawn now, in units of [0, 255]^2."""
        difference = self._drawn().to(torch.int32) - self.pictures.to(torch.int32)
        return float(difference.square().double().mean())

    def noise_ratio(self) -> float:
        """Return the ratio of signal and noise of the network's output now, in dB."""
        return self.calls.noise_ratio(self.network)

    def _drawn(self) -> Tensor:
        return self.drawings.draw(self.pipe, self.count)


@dataclass
class Sensitivities:
    """Measures layers, each where it is not in the file.

    Args:
        by_picture: measure content layers by the pictures; else all by the network's output.
        probe: function that returns the plain pictures and calls, called when something is measured.
    """

    bench: Bench
    records: RecordFile
    probe: Callable[[], Probe]
    by_picture: bool
    tell: Callable[[str], None]

    def measure(self, kind: Kind, choices: dict[str, tuple[int, ...]]) -> dict[str, dict[int, float]]:
        """Return the value of every choice of bits of every layer: higher is better, within a group alone."""
        total = sum(map(len, choices.values()))
        values: dict[str, dict[int, float]] = {}
        for number, (name, bits) in enumerate(self._all(choices)):
            key = self._key(kind, name, bits)
            is_new = key not in self.records.values
            value = self.records.get(key, partial(self._one, kind, name, bits))
            values.setdefault(name, {})[bits] = value
            if is_new:
                self.tell(f"{kind} {number + 1} of {total}: {name} at {bits} bits: {value:.6g}")
        return values

    def _all(self, choices: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int]]:
        return ((name, bits) for name, several in choices.items() for bits in several)

    def _key(self, kind: Kind, name: str, bits: int) -> str:
        return f"{kind} {'ssim' if self._is_content(name) else 'sqnr'} {bits} {name}"

    def _is_content(self, name: str) -> bool:
        return self.by_picture and self.layer(name).group == "content"

    def layer(self, name: str) -> LayerToPlan:
        """Return a planned layer."""
        return self.bench.layers[name]

    def _one(self, kind: Kind, name: str, bits: int) -> float:
        probe = self.probe()
        measured = probe.similarity if self._is_content(name) else probe.noise_ratio
        if kind == "activation":
            with self.bench.with_input(name, bits):
                return measured()
        alone: dict[str, PlannedLayer] = {name: self.bench.planned(name, bits, 16)}
        with self.bench.with_layers(alone, keep=False):
            return measured()

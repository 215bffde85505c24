"""Formats of quantized layers, and the closed forms that make codes of weights; no data is needed.

Codes are symmetric: ``q = clamp(round(w / s), -n, n)`` with ties to even and n = 127 for int8, 448 for float8 (e4m3fn),
7 for int4. A row without anything but zeros has codes 0 and the scale of the smallest magnitude, 1e-12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.codes import SMALLEST, Codes
from diffaccel.kernels.int4_weight import pack_int4
from diffaccel.kernels.quantize_rows import quantize_rows_reference

Name = Literal["w8a8", "w8a8_fp8", "w8a16", "w4a16", "w4a8", "low_bit", "mixed"]
Clip = Literal["mse", "none"]
LARGEST_4 = 7
LARGEST_MULTIPLIER = 18  # 18 * 7 = 126: the products of two-level groups are int8 codes
LEAST_GROUP = 16
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's largest magnitude, tried for the least squared error
_CHUNK = 1 << 24  # elements quantized at a time, which bounds the memory of a pass


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is stored and computed.

    Attributes:
        name: "w8a8" (int8 weight rows, int8 activation rows), "w8a8_fp8" (the same in float8), "w8a16" (int8 weight
            rows alone), "w4a16" (4-bit groups with fp32 scales), "w4a8" (4-bit groups whose scales are whole multiples
            of the row's, int8 activation rows).
        group: codes along K that share a scale; 0 for a whole row.
    """

    name: Name
    group: int = 0

    @property
    def bits(self) -> int:
        """Bits of a weight code."""
        return 4 if self.name.startswith("w4") else 8

    @property
    def activations(self) -> Codes | None:
        """Codes of the activations; None where they stay as they are."""
        return {"w8a8": "int8", "w8a8_fp8": "fp8", "w4a8": "int8"}.get(self.name)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored codes; uint8 holds two of 4 bits."""
        if self.bits == 4:
            return torch.uint8
        return torch.float8_e4m3fn if self.name == "w8a8_fp8" else torch.int8

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each stored tensor of a weight ``(out_features, in_features)``."""
        groups = in_features // self.group if self.group else 1
        columns = in_features // 2 if self.bits == 4 else in_features
        shapes = {"weight": ((out_features, columns), self.dtype)}
        if self.name == "w4a8":
            shapes["weight_multiplier"] = ((out_features, groups), torch.uint8)
            groups = 1
        return {**shapes, "weight_scale": ((out_features, groups), torch.float32)}

    def check(self, in_features: int) -> None:
        """Raise for a width that the format cannot store, where no other format takes its place."""

    def within(self, out_features: int, in_features: int) -> LayerFormat:
        """Return the format with what a layer of that size can have of it."""
        return self

    def __str__(self) -> str:
        return f"{self.name}:{self.group}" if self.group else self.name

    @classmethod
    def read(cls, text: str) -> LayerFormat:
        """Invert ``str``.

        Raises:
            DiffAccelError: for a text that names no format.
        """
        name, _, group = text.partition(":")
        names = ("w8a8", "w8a8_fp8", "w8a16", "w4a16", "w4a8")
        if name not in names or (name.startswith("w4") != bool(group)) or not (group or "1").isdigit():
            raise DiffAccelError(
                f"'{text}' is no format of a layer; it must be one of {', '.join(names)}, with ':GROUP' for 4 bits. "
                "The file is damaged, or of a newer version of diffaccel."
            )
        return cls(name, int(group or 0))  # type: ignore[arg-type]


def fitting(wanted: LayerFormat, in_features: int) -> LayerFormat:
    """Return a format for a layer of ``in_features``: groups that divide it, or 8 bits where none of 16 does."""
    wanted.check(in_features)
    if not wanted.group:
        return wanted
    group = math.gcd(wanted.group, in_features)
    if group < LEAST_GROUP or group % 2:
        return LayerFormat("w8a8" if wanted.name == "w4a8" else "w8a16")
    return LayerFormat(wanted.name, group)


@torch.no_grad()
def quantize_weight(weight: Tensor, form: LayerFormat, clip: Clip = "mse") -> dict[str, Tensor]:
    """Return the stored tensors of a weight ``(N, K)``, on its device.

    Args:
        clip: of 4 bits: choose each group's scale for the least squared error among fractions of its largest magnitude
            ("mse"), or take the largest magnitude ("none").

    Raises:
        DiffAccelError: for a weight that holds an infinity or not-a-number.
    """
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    with torch.autocast(weight.device.type, enabled=False):
        parts = [_quantize(part, form, clip) for part in weight.detach().split(rows)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not bool(torch.isfinite(tensors["weight_scale"]).all()):
        raise DiffAccelError(
            f"A weight of shape {tuple(weight.shape)} holds infinities or not-a-numbers. Repair the checkpoint, or "
            "name the layer in skip."
        )
    return tensors


def _quantize(weight: Tensor, form: LayerFormat, clip: Clip) -> dict[str, Tensor]:
    if form.bits == 8:
        codes, scale = quantize_rows_reference(weight, "fp8" if form.name == "w8a8_fp8" else "int8")
        return {"weight": codes, "weight_scale": scale}
    groups = weight.float().unflatten(1, (-1, form.group))  # (N, G, group)
    if form.name == "w4a16":
        scale = _grouped_scales(groups, clip)
        codes = _codes(groups, scale)
        return {"weight": pack_int4(codes.flatten(1)), "weight_scale": scale}
    amax = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST)
    scale = amax / (LARGEST_4 * LARGEST_MULTIPLIER)  # (N, 1)
    multiplier = _multipliers(groups, scale, clip)
    codes = _codes(groups, scale * multiplier)
    return {
        "weight": pack_int4(codes.flatten(1)),
        "weight_multiplier": multiplier.to(torch.uint8),
        "weight_scale": scale,
    }


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    """Return the codes in [-7, 7], int8 ``(N, G, group)``, of groups with scales ``(N, G)``."""
    return (groups / scale.unsqueeze(-1)).round().nan_to_num(0.0).clamp(-LARGEST_4, LARGEST_4).to(torch.int8)


def _squared_error(groups: Tensor, scale: Tensor) -> Tensor:
    """Return ``sum (w - q s)^2`` of each group, ``(N, G)``."""
    return (groups - _codes(groups, scale) * scale.unsqueeze(-1)).square().sum(dim=-1)


def _grouped_scales(groups: Tensor, clip: Clip) -> Tensor:
    """Return the scale of each group, fp32 ``(N, G)``."""
    best = groups.abs().amax(dim=-1).clamp_min(SMALLEST) / LARGEST_4
    if clip == "none":
        return best
    largest, error = best, _squared_error(groups, best)
    for shrink in _SHRINKS[1:]:
        scale = largest * shrink
        other = _squared_error(groups, scale)
        better = other < error
        best, error = torch.where(better, scale, best), torch.where(better, other, error)
    return best


def _multipliers(groups: Tensor, scale: Tensor, clip: Clip) -> Tensor:
    """Return the whole multiple of the row's scale for each group, fp32 ``(N, G)`` in 1..18."""
    exact = groups.abs().amax(dim=-1) / (LARGEST_4 * scale)
    best = (exact - 1e-4).ceil().nan_to_num(1.0).clamp(1, LARGEST_MULTIPLIER)
    if clip == "none":
        return best
    largest, error = best, _squared_error(groups, scale * best)
    for shrink in _SHRINKS[1:]:
        multiplier = (largest * shrink).round().clamp_min(1)
        other = _squared_error(groups, scale * multiplier)
        better = other < error
        best, error = torch.where(better, multiplier, best), torch.where(better, other, error)
    return best

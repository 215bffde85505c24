"""Layers of a plan put into a network and taken out again: one alone, or all of a choice of bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.quant.formats import Clip
from diffaccel.quant.mixdq.calibrate import CalibratedRanges
from diffaccel.quant.mixdq.candidates import LayerToPlan
from diffaccel.quant.mixdq.plan_file import PlannedLayer, mixed_format
from diffaccel.quant.mixed.activations import grid_of, picture_levels, static_levels, token_rows
from diffaccel.quant.mixed.base import MixedLayer
from diffaccel.quant.mixed.conv import MixedConv2d
from diffaccel.quant.mixed.first_row import row_kinds
from diffaccel.quant.mixed.form import InputRange, MixedFormat
from diffaccel.quant.mixed.linear import MixedLinear
from diffaccel.quant.plan import layers_of


class Bench:
    """Makes the layers of a choice of bits for one network, each once.

    Args:
        scale: of activations, "tensor" or "token".
        group_size: of weights below 8 bits.
        scales: of weights, "mse" or "none".
    """

    def __init__(
        self, network: nn.Module, layers: dict[str, LayerToPlan], ranges: CalibratedRanges, config: Any
    ) -> None:
        self.network, self.layers, self.ranges = network, layers, ranges
        self.config, self.scales = config, config.scales
        self.places = {name: (parent, attribute) for name, parent, attribute, _ in layers_of(network)}
        self._made: dict[tuple[str, PlannedLayer], MixedLayer] = {}

    def planned(self, name: str, weight: int, activation: int) -> PlannedLayer:
        """Return the entry of a layer with these bits; one that runs once a sample keeps its input."""
        layer, known = self.layers[name], self.ranges.ranges[name]
        bits = 16 if layer.keeps_input else activation
        is_static = bits < 16 and self.config.activation_scale == "tensor"
        low, high = (known.low, known.high) if is_static else ((), ())
        return PlannedLayer(weight, bits, low, high, layer.split, name in self.ranges.readers)

    def form(self, name: str, planned: PlannedLayer) -> MixedFormat:
        """Return the format of a layer."""
        config = self.config
        return mixed_format(planned, self.layers[name].module, config.activation_scale, config.group_size)

    def layer(self, name: str, planned: PlannedLayer) -> MixedLayer:
        """Return the quantized layer of an entry."""
        key = (name, planned)
        if key not in self._made:
            module, scales = self.layers[name].module, self.scales
            layer = made(module, self.form(name, planned), self.ranges.known(name), scales)
            layer.mode = self.config.backend
            self._made[key] = layer.train(module.training)
        return self._made[key]

    @contextlib.contextmanager
    def with_layers(self, entries: Mapping[str, PlannedLayer], keep: bool = True) -> Iterator[None]:
        """Put layers into the network for the block.

        Args:
            keep: the layers, for another time.
        """
        try:
            for name, planned in entries.items():
                parent, attribute = self.places[name]
                setattr(parent, attribute, self.layer(name, planned))
            yield
        finally:
            for name in entries:
                parent, attribute = self.places[name]
                setattr(parent, attribute, self.layers[name].module)
            if not keep:
                self._made.clear()

    @contextlib.contextmanager
    def with_input(self, name: str, bits: int) -> Iterator[None]:
        """Round the input of one layer for the block, and leave its weight as it is."""
        planned, module = self.planned(name, 8, bits), self.layers[name].module
        form, known = self.form(name, planned), self.ranges.known(name)

        def rounded(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (rounded_input(args[0], form, known), *args[1:])

        hook = module.register_forward_pre_hook(rounded)
        try:
            yield
        finally:
            hook.remove()


def made(module: nn.Module, form: MixedFormat, known: InputRange, scales: Clip) -> MixedLayer:
    """Return the quantized layer of a module."""
    cls: Any = MixedLinear if isinstance(module, nn.Linear) else MixedConv2d
    return cls.of(module, form, known, scales)


def rounded_input(x: Tensor, form: MixedFormat, known: InputRange) -> Tensor:
    """Return an input as its codes stand for it, special text rows left alone."""
    if x.ndim == 4:
        parts = (x[:, : form.split], x[:, form.split :]) if form.split else (x,)
        return torch.cat([_rounded_picture(part, form, known, i) for i, part in enumerate(parts)], dim=1)
    rows = x.reshape(-1, x.shape[-1])
    if form.is_static:
        scale, zero = (value.to(x.device) for value in grid_of(known.low, known.high, form.activation_bits))
        rounded = (static_levels(rows, scale, zero, form.activation_bits) * scale).to(x.dtype)
    else:
        codes, scales = token_rows(rows, form.activation_bits)
        rounded = (codes.float() * scales).to(x.dtype)
    rounded = rounded.reshape(x.shape)
    if known.first_row is None or x.ndim != 3:
        return rounded
    kinds = row_kinds(x, known.first_row.to(x.device))
    rounded = torch.where(kinds.constant | kinds.zero, x, rounded)
    return torch.cat([torch.where(kinds.other, x[:, 0], rounded[:, 0]).unsqueeze(1), rounded[:, 1:]], dim=1)


def _rounded_picture(x: Tensor, form: MixedFormat, known: InputRange, number: int) -> Tensor:
    if form.is_static:
        scale, zero = (value[number].to(x.device) for value in grid_of(known.low, known.high, form.activation_bits))
        return (static_levels(x, scale, zero, form.activation_bits) * scale).to(x.dtype)
    levels, scale = picture_levels(x, form.activation_bits)
    return (levels * scale).to(x.dtype)

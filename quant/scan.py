"""The error that quantization makes in each layer, on the activations of real calls, and the skips that it proposes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel import families
from diffaccel.errors import DiffAccelError
from diffaccel.modules.stand_in import uncompiled
from diffaccel.quant.options import QuantizationOptions
from diffaccel.quant.plan import check_skips, layers_of, plan
from diffaccel.quant.swap import quantized


@dataclass(frozen=True)
class LayerError:
    """The error of one layer.

    Attributes:
        name: its name in the network.
        form: its format, as text.
        error: ``|y - y_q| / |y|`` over all calls.
        share: its part of the quantized parameters.
    """

    name: str
    form: str
    error: float
    share: float


@dataclass(frozen=True)
class ErrorScan:
    """Errors of the layers of a network, the largest first; prints as a table of the largest."""

    layers: tuple[LayerError, ...]

    def skips(self, threshold: float = 0.05, budget: float = 0.05) -> tuple[str, ...]:
        """Return regexes of the layers to leave alone, for an option ``skip``.

        Args:
            threshold: only layers with a larger error.
            budget: only as many of them, the largest errors first, as hold this part of the quantized parameters.
        """
        proposed, spent = [], 0.0
        for layer in self.layers:
            if layer.error > threshold and spent + layer.share <= budget:
                proposed.append(re.escape(layer.name))
                spent += layer.share
        return tuple(proposed)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{layer.name:<{width}}  {layer.error:8.4f}  {layer.share:6.2%}  {layer.form}" for layer in self.layers
        ]
        return "\n".join([f"{'layer':<{width}}  {'error':>8}  {'share':>6}  format", *lines[:20]])


class _Sums:
    """Squared sums of one layer's error and output, kept on the device."""

    def __init__(self, module: nn.Module, layer: nn.Module) -> None:
        self.layer = layer
        self.error: Tensor | float = 0.0
        self.output: Tensor | float = 0.0
        self.hook = module.register_forward_hook(self._add)

    @torch.no_grad()
    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        other = self.layer(*args)
        self.error = self.error + (other.double() - output.double()).square().sum()
        self.output = self.output + output.double().square().sum()


def scan_errors(pipe: Any, config: QuantizationOptions, run: Callable[[Any], Any]) -> ErrorScan:
    """Measure the error of each layer alone: every layer gets the activations of the plain network.

    Args:
        pipe: a diffusers pipeline that is not quantized; it is as it was afterwards.
        config: the quantizer whose layers and formats are measured.
        run: calls the pipeline, once or more: ``lambda pipe: pipe("a prompt", num_inference_steps=4)``.

    Raises:
        DiffAccelError: for a pipeline without a network or with a quantized one, when ``run`` called no layer of it,
            and when the plain network returns numbers that are not finite.
    """
    networks = [uncompiled(network) for network in families.networks(pipe)]
    if not networks:
        raise DiffAccelError(
            f"There is no network in {type(pipe).__name__} to scan. Pass one with a transformer or UNet."
        )
    check_skips(networks, config)
    sums: dict[str, tuple[_Sums, int, str]] = {}
    try:
        for number, network in enumerate(networks):
            layers = plan(network, config)
            for name, _, _, module in layers_of(network):
                if name in layers:
                    key = f"{number}:{name}" if number else name
                    layer = quantized(module, layers[name], config, name)
                    sums[key] = _Sums(module, layer), module.weight.numel(), str(layers[name])  # type: ignore
        run(pipe)
    finally:
        for entry, _, _ in sums.values():
            entry.hook.remove()
    if not any(isinstance(entry.output, Tensor) for entry, _, _ in sums.values()):
        raise DiffAccelError("run(pipe) called no layer of the network. It must call the pipeline that it is given.")
    if broken := next((name for name, (entry, _, _) in sums.items() if not math.isfinite(float(entry.output))), None):
        raise DiffAccelError(
            f"The plain layer '{broken}' returned numbers that are not finite, before anything is quantized. Check the "
            "model, its dtype and the call."
        )
    total = sum(size for _, size, _ in sums.values())
    rows = [LayerError(name, form, _relative(entry), size / total) for name, (entry, size, form) in sums.items()]
    return ErrorScan(tuple(sorted(rows, key=lambda row: -row.error)))


def _relative(entry: _Sums) -> float:
    output = float(entry.output)
    return (float(entry.error) / output) ** 0.5 if output else 0.0

"""Quantized layers in the place of a network's own, and back to the bit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.dispatch import capability, has_triton
from diffaccel.quant.conv import QConv2d
from diffaccel.quant.formats import LayerFormat
from diffaccel.quant.layer import QuantizedLayer
from diffaccel.quant.linear import QLinear
from diffaccel.quant.lora_guard import guard, unguard
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.linear import LowBitLinear, attach_time
from diffaccel.quant.low_bit.timesteps import detach
from diffaccel.quant.mixed.conv import MixedConv2d
from diffaccel.quant.mixed.first_row import share_rows
from diffaccel.quant.mixed.form import MixedFormat
from diffaccel.quant.mixed.linear import MixedLinear
from diffaccel.quant.options import QuantizationOptions
from diffaccel.quant.plan import check_skips, layers_of, plan
from diffaccel.quant.stored import StoredQuantization

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class QuantizedNetwork:
    """One network whose layers were replaced.

    Attributes:
        originals: the layers that were replaced, with what replaced each; None where they were dropped.
        stored: what was written into the network's config, to be saved with it.
    """

    network: nn.Module
    method: str
    originals: list[tuple[nn.Module, nn.Module]] | None
    stored: dict[str, Any]

    def remove(self) -> None:
        """Put the layers back wherever their replacements are now; device and dtype are those of the moment.

        They are rounded by the casts that the network went through, as its other layers were.
        """
        if self.originals is None:
            raise DiffAccelError(
                f"'{self.method}' was applied with originals='drop', so that the layers it replaced are gone. Load the "
                "pipeline again."
            )
        by_layer = {id(layer): (layer, original) for layer, original in self.originals}
        for parent in list(self.network.modules()):
            for attribute, child in list(parent._modules.items()):
                if id(child) in by_layer:
                    layer, original = by_layer[id(child)]
                    setattr(parent, attribute, _cast_like(layer, original))
        forget(self.network, self.stored)
        unguard(self.network)
        detach(self.network)


def _cast_like(layer: Any, original: nn.Module) -> nn.Module:
    """Return a layer on the device and in the dtype of what stood for it, after the same casts."""
    for dtype in (*layer.casts, layer.compute_dtype):
        original = original.to(layer.weight.device, dtype)
    return original


@dataclass(eq=False)
class QuantizedNetworks:
    """Takes the quantized layers of all networks of a pipeline off again."""

    networks: list[QuantizedNetwork]

    def remove(self) -> None:
        """Put every layer back."""
        for network in self.networks:
            network.remove()


def quantize_networks(networks: Sequence[nn.Module], config: QuantizationOptions) -> QuantizedNetworks:
    """Quantize networks in place; where one cannot be, all are as they were.

    Raises:
        DiffAccelError: see :meth:`diffaccel.quant.base.Quantization.apply`.
    """
    check_skips(networks, config)
    check_backend(networks, config)
    plans = [plan(network, config) for network in networks]
    for network, layers in zip(networks, plans, strict=True):
        _check(network, layers)
    done: list[QuantizedNetwork] = []
    try:
        for network, layers in zip(networks, plans, strict=True):
            done.append(QuantizedNetwork(network, config.name, [], {}))
            _quantize(done[-1], layers, config)
        if config.originals == "drop":
            for quantized in done:
                quantized.originals = None
        return QuantizedNetworks(done)
    except BaseException:  # an interrupt may come at any line until the caller has what takes the layers off
        for quantized in done:
            if quantized.originals is not None:
                quantized.remove()
        raise


def _check(network: nn.Module, layers: dict[str, LayerFormat]) -> None:
    """Raise for layers whose weight lies elsewhere, that a hook fills at each call, or that holds no numbers."""
    for name, _, _, module in layers_of(network):
        hooked = getattr(module, "_hf_hook", None) is not None or _is_group_offloaded(module)
        if name in layers and (hooked or module.weight.is_meta):
            raise DiffAccelError(
                f"The weight of '{name}' is offloaded layer by layer. Quantize first, and call "
                "enable_sequential_cpu_offload or enable_group_offload after that."
            )
        weight: Any = module.weight
        if name in layers and not bool(torch.isfinite(weight).all()):
            raise DiffAccelError(
                f"The weight of '{name}' holds infinities or not-a-numbers. Repair the checkpoint, or name it in skip."
            )


def _is_group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


def _quantize(done: QuantizedNetwork, layers: dict[str, LayerFormat], config: QuantizationOptions) -> None:
    started = time.perf_counter()
    network, before, after = done.network, 0, 0
    for name, parent, attribute, module in list(layers_of(network)):
        if name not in layers:
            continue
        try:
            layer = quantized(module, layers[name], config, name)
        except DiffAccelError as error:
            raise DiffAccelError(f"'{name}': {error}") from None
        before += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        after += layer.weight_bytes()
        if config.originals == "cpu" and done.originals is not None:
            done.originals.append((layer, module))  # first: an interrupt between the two loses nothing
        setattr(parent, attribute, layer)
        if config.originals == "cpu" and module.weight.device != torch.device("cpu"):
            _to_host(module)
    share_rows(network)
    done.stored = StoredQuantization(config, layers).to_dict()
    remember(network, done.stored)
    guard(network)
    attach_time(network)
    logger.info(
        f"{config.name}: {len(layers)} layers of {type(network).__name__}, {before / 2**20:.0f} to {after / 2**20:.0f} "
        f"MiB, in {time.perf_counter() - started:.1f} s"
    )


def layer_class(module: nn.Module, form: LayerFormat) -> type[Any]:
    """Return the class of the quantized layer that stands for one, by its format."""
    if isinstance(module, nn.Linear):
        return LowBitLinear if isinstance(form, LowBit) else MixedLinear if isinstance(form, MixedFormat) else QLinear
    return MixedConv2d if isinstance(form, MixedFormat) else QConv2d


def check_backend(networks: Sequence[nn.Module], config: QuantizationOptions) -> None:
    """Raise for ``backend="fused"`` on a device that has no kernels."""
    if config.backend != "fused":
        return
    for network in networks:
        hook = getattr(network, "_hf_hook", None)  # of model offloading, which knows where the network computes
        place = getattr(hook, "execution_device", None)
        device = torch.device(next(network.parameters()).device if place is None else place)
        if not (device.type == "cuda" and has_triton() and capability(device) >= (8, 0)):
            raise DiffAccelError(
                f"{type(config).__name__}.backend is 'fused' and {type(network).__name__} is on {device}, which has no "
                "kernels; pipe.to('cuda') first, or take backend='auto'."
            )


def quantized(module: nn.Module, form: LayerFormat, config: QuantizationOptions, name: str = "") -> QuantizedLayer:
    """Return the quantized layer that stands for a linear layer or a convolution of that name."""
    layer: QuantizedLayer
    if (own := config.layer(name, module, form)) is not None:
        layer = own
    elif isinstance(module, nn.Linear):
        layer = layer_class(module, form).of(module, form, config.clip)
    elif isinstance(module, nn.Conv2d):
        layer = QConv2d.of(module, form)
    else:
        raise DiffAccelError(f"Got a {type(module).__name__}; only nn.Linear and nn.Conv2d are quantized.")
    config.finish(layer)
    return layer.train(module.training)


def empty_layer(module: nn.Module, form: LayerFormat, dtype: torch.dtype) -> QuantizedLayer:
    """Return a quantized layer whose tensors are to be loaded, for a linear layer or a convolution."""
    layer: QuantizedLayer = layer_class(module, form).empty(module, form, dtype)
    return layer


def _to_host(module: nn.Module) -> None:
    """Move a layer's weight to the host's memory; the bias is shared with the layer that replaced it."""
    weight = module.weight
    module.weight = nn.Parameter(weight.detach().to("cpu"), requires_grad=weight.requires_grad)  # type: ignore


def remember(network: Any, stored: dict[str, Any]) -> None:
    """Write into the network's config what ``save_pretrained`` saves."""
    if hasattr(network, "register_to_config"):
        network.register_to_config(quantization_config=stored)


def forget(network: Any, stored: dict[str, Any]) -> None:
    """Undo :func:`remember`, unless somebody else has written since."""
    config = getattr(network, "_internal_dict", None)
    if config is not None and config.get("quantization_config") is stored:
        network._internal_dict = type(config)({k: v for k, v in config.items() if k != "quantization_config"})

"""Which layers of a network are quantized, and to which format: by the facts of its family and the user's options."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.families.facts_data import NORMS
from diffaccel.quant.conv import QConv2d
from diffaccel.quant.formats import LayerFormat, fitting
from diffaccel.quant.layer import QuantizedLayer
from diffaccel.quant.options import QuantizationOptions

# of networks that are not listed: norms, whatever embeds, and first and last layers by their usual names
UNLISTED = (NORMS, r"(?:.*\.)?\w*embed\w*(?:\..*)?", r"conv_(?:in|out)", r"proj_(?:in|out)", "head", "final_layer")


def layers_of(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Yield name, parent, attribute and module of every linear, 2D convolution and quantized layer.

    A layer below an adapter has the name that it has without the adapter, and the adapter's own linears are left out.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        if isinstance(getattr(module, "base_layer", None), nn.Module):  # an adapter
            base: nn.Module = module.base_layer  # type: ignore[assignment]
            yield from visit(prefix, module, "base_layer", base)
            return
        for attribute, child in module.named_children():
            yield from visit(f"{prefix}.{attribute}" if prefix else attribute, module, attribute, child)

    def visit(name: str, parent: nn.Module, attribute: str, child: nn.Module) -> Any:
        if isinstance(child, nn.Linear | nn.Conv2d):
            yield name, parent, attribute, child
        else:
            yield from walk(child, name)

    yield from walk(network, "")


def plan(network: nn.Module, config: QuantizationOptions) -> dict[str, LayerFormat]:
    """Return the format of each layer that a config quantizes, by its name.

    Weights that two layers share stay as they are.

    Raises:
        DiffAccelError: for a network that is quantized already, or without a layer to quantize.
    """
    modules = list(layers_of(network))
    if done := next((name for name, _, _, module in modules if isinstance(module, QuantizedLayer)), None):
        raise DiffAccelError(
            f"{type(network).__name__} is quantized already ('{done}'). diffaccel.remove(pipe) first, or load the "
            "original weights."
        )
    if (planned := config.planned_formats(network)) is not None:
        return planned
    uses = Counter(id(module.weight) for _, _, _, module in modules)
    layers = {}
    for name, _, _, module in modules:
        form = None if uses[id(module.weight)] > 1 or config.skips(name) else _format(network, config, name, module)
        if form is not None:
            layers[name] = form
    if not layers:
        raise DiffAccelError(
            f"'{config.name}' leaves every layer of {type(network).__name__} as it is: it has {len(modules)} linears "
            "and convolutions, and all are skipped. Skip fewer."
        )
    return layers


def check_skips(networks: Sequence[nn.Module], config: QuantizationOptions) -> None:
    """Raise for a pattern of ``skip`` that matches no layer, with the names that are nearest to it."""
    names = [name for network in networks for name, _, _, _ in layers_of(network)]
    for pattern in config.skip:
        if not any(re.match(rf"(?:{pattern})(?:\.|$)", name) for name in names):
            near = difflib.get_close_matches(pattern.replace("\\", ""), names, n=3, cutoff=0.0)
            raise DiffAccelError(
                f"{type(config).__name__}.skip has {pattern!r}, which matches no layer; the nearest are "
                f"{', '.join(map(repr, near)) or 'none'}. A pattern matches from the beginning of a name."
            )


def _format(network: nn.Module, config: QuantizationOptions, name: str, module: nn.Module) -> LayerFormat | None:
    """Return the format of one layer, or None where it stays."""
    if type(module) not in (nn.Linear, nn.Conv2d):  # a subclass computes something of its own
        return None
    try:
        facts = facts_of(network)
    except DiffAccelError:
        facts = None
    if isinstance(module, nn.Linear) and config.all_linears:
        return fitting(config.linear_format().within(module.out_features, module.in_features), module.in_features)
    is_modulation = facts is not None and re.fullmatch(facts.modulation, name) is not None
    if isinstance(module, nn.Linear) and is_modulation:
        form = config.modulation_format()
        return None if form is None else fitting(form, module.in_features)
    keeps = facts.keeps(name) if facts is not None else any(re.fullmatch(pattern, name) for pattern in UNLISTED)
    if keeps:
        return None
    if isinstance(module, nn.Linear):
        return fitting(config.linear_format().within(module.out_features, module.in_features), module.in_features)
    form = config.conv_format()
    if form is not None and form.activations and isinstance(module, nn.Conv2d) and not QConv2d.multiplies_codes(module):
        return LayerFormat("w8a16")
    return form

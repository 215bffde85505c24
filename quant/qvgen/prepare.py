"""From a network to one that is trained with rounding, and from that to one with codes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.conv import QConv2d
from diffaccel.quant.formats import LayerFormat
from diffaccel.quant.linear import QLinear
from diffaccel.quant.lora_guard import guard
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.linear import attach_time
from diffaccel.quant.low_bit.timesteps import TimeGroups, attach
from diffaccel.quant.plan import check_skips, layers_of, plan
from diffaccel.quant.qvgen.layer import FakeQLinear
from diffaccel.quant.qvgen.options import TrainedQuantization
from diffaccel.quant.stored import StoredQuantization
from diffaccel.quant.swap import quantized, remember

logger = logging.getLogger(__name__)


def fake_layers(network: nn.Module) -> Iterator[tuple[str, FakeQLinear]]:
    """Yield name and module of every layer that is trained with rounding."""
    for name, module in network.named_modules():
        if isinstance(module, FakeQLinear):
            yield name, module


def prepare_qat(network: Any, config: TrainedQuantization, largest_time: float | None = None) -> Any:
    """Replace a network's linears by ones that are trained with rounding, in place.

    Layers that the config gives 8-bit weights alone (modulation, convolutions) get them now, and are not trained.

    Args:
        network: of diffusers, or any other.
        config: ``QVGen(weight_bits=4, act_bits=4)``.
        largest_time: the network's time of pure noise; that of its family, or 1000.

    Returns:
        The network; its own parameters and the side branches are to be trained.

    Raises:
        DiffAccelError: for a network that is quantized or sharded, has adapters or weights that are not finite.
    """
    layers = trainable(network, config)
    found = {name: (parent, attribute, module) for name, parent, attribute, module in layers_of(network)}
    clamped = []
    for name, form in layers.items():
        parent, attribute, module = found[name]
        layer: nn.Module
        if isinstance(form, LowBit) and isinstance(module, nn.Linear):
            rank = min(config.rank, module.in_features, module.out_features)
            clamped += [name] * (rank < config.rank)
            trained = replace(form, act_groups=config.groups, rank=0)
            layer = FakeQLinear(module, trained, rank, config.range_gradients).train(module.training)
        else:
            layer = quantized(module, form, config).requires_grad_(False)
        setattr(parent, attribute, layer)
    if clamped:
        logger.warning(
            f"The rank {config.rank} is cut to the size of {len(clamped)} small layers, first '{clamped[0]}'."
        )
    attach(network, [layer for _, layer in fake_layers(network)], config.groups, largest_time)
    network.trained_quantization = config
    return network


def trainable(network: nn.Module, config: TrainedQuantization) -> dict[str, LayerFormat]:
    """Return the format of every layer that is trained or quantized, by name; nothing is changed.

    Raises:
        DiffAccelError: as :func:`prepare_qat`, and for a pattern of ``skip`` that matches no layer.
    """
    _check(network)
    check_skips([network], config)
    layers = plan(network, config)
    for name, _, _, module in layers_of(network):
        if name in layers and not bool(torch.isfinite(module.weight).all()):  # type: ignore[arg-type]
            raise DiffAccelError(
                f"The weight of '{name}' holds infinities or not-a-numbers. Repair the checkpoint, or name it in skip."
            )
    return layers


def _check(network: nn.Module) -> None:
    kind = type(network).__name__
    if name := next((name for name, _ in fake_layers(network)), None):
        raise DiffAccelError(f"{kind} is prepared for training already ('{name}'). Prepare a network once.")
    for name, p in network.named_parameters():
        if "lora_" in name or ".base_layer." in name:
            raise DiffAccelError(
                f"{kind} has LoRA adapters ({name}), which have no place beside weights that learn. Fuse them first: "
                "pipe.fuse_lora(), then pipe.unload_lora_weights()."
            )
        if type(p.data).__name__ == "DTensor" or type(p).__name__ == "DTensor":
            raise DiffAccelError(
                f"{kind} is sharded ('{name}'): side branches change their shape in training, which fully_shard cannot "
                "follow. Give it whole: ShardedQATRun shards what it can, QATRun trains one copy a process."
            )


@torch.no_grad()
def convert(network: Any, keep_rank: bool = False) -> Any:
    """Replace the trained linears by ones with codes, in place, and note the format in the network's config.

    Args:
        keep_rank: let side branches that are left stay beside the codes.

    Raises:
        DiffAccelError: for a network that was not prepared, side branches that are left, numbers that are not finite.
    """
    config: TrainedQuantization | None = getattr(network, "trained_quantization", None)
    trained = dict(fake_layers(network))
    if config is None or not trained:
        raise DiffAccelError(f"{type(network).__name__} was not prepared. Call prepare_qat(network, config) first.")
    made = {}
    for name, layer in trained.items():
        try:
            made[name] = layer.exported(keep_rank or config.keep_rank > 0)
        except DiffAccelError as error:
            raise DiffAccelError(f"'{name}': {error}") from None
    largest = next((h.largest for h in network._forward_pre_hooks.values() if isinstance(h, TimeGroups)), None)
    for name, other in made.items():
        parent, _, attribute = name.rpartition(".")
        config.finish(other)
        setattr(network.get_submodule(parent), attribute, other.train(trained[name].training))
    forms: dict[str, LayerFormat] = {
        name: module.form for name, _, _, module in layers_of(network) if isinstance(module, QLinear | QConv2d)
    }
    remember(network, StoredQuantization(config, forms).to_dict())
    del network.trained_quantization
    guard(network)
    attach_time(network, largest)
    return network

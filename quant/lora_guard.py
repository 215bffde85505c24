"""Refuses to fuse adapters into quantized weights: their codes cannot take the sum in and give it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.layer import QuantizedLayer


class LoraGuard:
    """Stands in for one method of a network, or of an adapter in it, and copies with it."""

    def __init__(self, network: Any, owner: Any, name: str) -> None:
        self.network, self.owner, self.name = network, owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name == "fuse_qkv_projections" and _has_codes(self.network):
            raise DiffAccelError(
                "fuse_qkv_projections would join the codes of quantized weights as if they were numbers. Call it "
                "before quantizing."
            )
        for name, module in self.network.named_modules():
            if isinstance(getattr(module, "base_layer", None), QuantizedLayer):
                raise DiffAccelError(
                    f"{self.name} would change the quantized weight of '{name}', whose codes cannot hold the sum. Fuse "
                    "before quantizing (diffaccel.remove, fuse_lora, accelerate), or leave the adapter beside the "
                    "weight, where it works as ever."
                )
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)


def _has_codes(network: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLayer) for module in network.modules())


def guard(network: nn.Module) -> None:
    """Put guards on a network that can fuse adapters, and on the adapters that are fused already."""
    for owner, name in _guarded(network):
        vars(owner)[name] = LoraGuard(network, owner, name)


def unguard(network: nn.Module) -> None:
    """Take the guards off."""
    for owner, name in _guarded(network):
        if isinstance(vars(owner).get(name), LoraGuard):
            del vars(owner)[name]


def _guarded(network: nn.Module) -> Iterator[tuple[Any, str]]:
    for name in ("fuse_lora", "unfuse_lora", "fuse_qkv_projections"):
        if hasattr(type(network), name):
            yield network, name
    for module in network.modules():
        if hasattr(module, "base_layer") and getattr(module, "merged", False):
            yield module, "unmerge"

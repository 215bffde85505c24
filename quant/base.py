"""The base of the quantizers of weights: put on the networks of a pipeline, or given to diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from diffaccel import families
from diffaccel.config import Handle
from diffaccel.errors import DiffAccelError
from diffaccel.modules.stand_in import uncompiled
from diffaccel.quant.options import QuantizationOptions
from diffaccel.quant.stored import StoredQuantization
from diffaccel.quant.swap import quantize_networks


class DiffusersConfig:
    """The interface of what diffusers takes as a ``quantization_config``.

    Its table of config classes holds this one: it tells ours from others by it, and reads files with it.
    """

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Read what a quantized model's ``config.json`` says."""
        return StoredQuantization.read(values)


@dataclass(frozen=True, kw_only=True)
class Quantization(QuantizationOptions, DiffusersConfig):
    """Base of the quantizers: their options, and their way onto a pipeline."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return super().from_dict(values)

    def apply(self, pipe: Any) -> Handle:
        """Quantize every network of a pipeline.

        Raises:
            DiffAccelError: for a pipeline without a network or a network without such layers, one that is quantized
                already, and one whose layers are hooked by an offloading that must come later.
        """
        networks: list[nn.Module] = [uncompiled(network) for network in families.networks(pipe)]
        if not networks:
            raise DiffAccelError(
                f"'{self.name}' found no network in {type(pipe).__name__}. Pass a pipeline with a transformer or UNet."
            )
        return quantize_networks(networks, self)

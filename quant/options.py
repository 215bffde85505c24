"""Options that all quantizers of weights share, and the format that they ask for each kind of layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from diffaccel.config import Config, Level, Machine, Touches
from diffaccel.errors import DiffAccelError
from diffaccel.kernels.dispatch import Mode
from diffaccel.quant.formats import Clip, LayerFormat

Modulation = Literal["int8", "int4", "keep"]
Convolutions = Literal["weights", "int8", "keep"]
Originals = Literal["cpu", "drop"]
FORMAT_VERSION = 1


class QuantMethod(StrEnum):
    """The name under which diffusers knows the quantizers: ``quant_method`` in a model's ``config.json``."""

    DIFFACCEL = "diffaccel"


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(Config):
    """Options of quantizers that replace the layers of a network by quantized ones; no data is needed.

    Embedders, norms, and the first and last layer stay in high precision by the facts of each family. The linears that
    turn the time embedding into shifts, scales and gates run once a sample: their weight alone is quantized.

    Args:
        skip: regexes of names of more modules that stay in high precision, with all modules inside of them.
        modulation: codes of the linears that make shifts, scales and gates; "keep" leaves them as they are.
        convs: of 2D convolutions, quantize the weights alone to int8 ("weights"), activations as well with a scale for
            each picture ("int8", with exact sums), or nothing ("keep").
        backend: form of the operations: "auto" is the kernel where the device has one, "reference" a plain formula on
            any device, "fused" raises where there is no kernel.
        originals: where the layers that are replaced rest until they are put back: in the memory of the host ("cpu"),
            or nowhere ("drop"), which saves it and makes ``remove`` impossible.
    """

    touches: ClassVar[Touches] = "weights"
    quant_method: ClassVar[QuantMethod] = QuantMethod.DIFFACCEL
    conflicts: ClassVar[tuple[str, ...]] = ("w8a8", "w4a16", "w4a8", "mixdq", "qvgen")

    skip: tuple[str, ...] = ()
    modulation: Modulation = "int8"
    convs: Convolutions = "weights"
    backend: Mode = "auto"
    originals: Originals = "cpu"

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return what the kernels need: Triton and a CUDA device of capability 8.0."""
        if machine.device == "cuda" and machine.triton and (machine.capability or (0, 0)) >= (8, 0):
            return "fast", "kernels for this device"
        return "slow", "plain formulas on this device: saves memory, costs time"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether a pipeline, by its class name and its family or None, has layers to quantize, and why."""
        if family is None:
            return None, "quantizes linears and convolutions of a network that is not listed, by their names"
        return True, "quantizes the network's linears and convolutions"

    def validate(self) -> None:
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise DiffAccelError(
                    f"{type(self).__name__}.skip has {pattern!r}, which is no regular expression ({error})."
                ) from None

    @property
    def all_linears(self) -> bool:
        """Whether embedders, modulation and the last layers are quantized as all linears are."""
        return False

    @property
    def clip(self) -> Clip:
        """How 4-bit scales are chosen."""
        return "mse"

    def linear_format(self) -> LayerFormat:
        """Return the format of linears that run once a token."""
        raise NotImplementedError

    def modulation_format(self) -> LayerFormat | None:
        """Return the format of linears that run once a sample; None to leave them."""
        if self.modulation == "keep":
            return None
        return LayerFormat("w8a16") if self.modulation == "int8" else LayerFormat("w4a16", 128)

    def conv_format(self) -> LayerFormat | None:
        """Return the format of 2D convolutions; None to leave them."""
        if self.convs == "keep":
            return None
        return LayerFormat("w8a8" if self.convs == "int8" else "w8a16")

    def read_format(self, text: str) -> LayerFormat:
        """Return the format of a layer that a stored model names."""
        return LayerFormat.read(text)

    def planned_formats(self, network: Any) -> dict[str, LayerFormat] | None:
        """Return the format of each layer by a plan of the method's own; None where facts and options say it."""
        return None

    def layer(self, name: str, module: Any, form: LayerFormat) -> Any | None:
        """Return a quantized layer of the method's own for a module; None for that of the format."""
        return None

    def finish(self, layer: Any) -> None:
        """Set what a layer's calls depend on and its file does not hold."""
        layer.mode = self.backend

    def skips(self, name: str) -> bool:
        """Return whether the user asked to leave a module alone."""
        return any(re.match(rf"(?:{pattern})(?:\.|$)", name) for pattern in self.skip)

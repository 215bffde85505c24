"""What a quantized network's ``config.json`` says: method, options, and the format of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffaccel import registry
from diffaccel.errors import DiffAccelError
from diffaccel.quant.formats import LayerFormat
from diffaccel.quant.options import FORMAT_VERSION, QuantizationOptions, QuantMethod


@dataclass(frozen=True)
class StoredQuantization:
    """A method with its options, and the formats of the layers that it quantized.

    As a dict: ``{"quant_method": "diffaccel", "format_version": 1, "method": {"name": ..., option: ...}, "layers":
    {format: [names]}}``.
    """

    quant_method: ClassVar[QuantMethod] = QuantMethod.DIFFACCEL

    method: QuantizationOptions
    layers: dict[str, LayerFormat]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready dict."""
        layers: dict[str, list[str]] = {}
        for name, form in self.layers.items():
            layers.setdefault(str(form), []).append(name)
        version = {"quant_method": str(QuantMethod.DIFFACCEL), "format_version": FORMAT_VERSION}
        method = {k: list(v) if isinstance(v, tuple) else v for k, v in self.method.to_dict().items()}
        return {**version, "method": method, "layers": layers}

    @classmethod
    def read(cls, values: dict[str, Any]) -> StoredQuantization:
        """Invert :meth:`to_dict`.

        Raises:
            DiffAccelError: for another version, an unknown method or option, and an unknown format.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise DiffAccelError(
                f"The quantized model has format version {version!r}; this diffaccel reads {FORMAT_VERSION}. Update "
                "diffaccel, or quantize the model again."
            )
        if not isinstance(values.get("method"), dict) or not isinstance(values.get("layers"), dict):
            raise DiffAccelError("The quantization_config of the model's config.json lacks its method or its layers.")
        if not all(isinstance(names, list) for names in values["layers"].values()):
            raise DiffAccelError("The layers of the model's quantization_config must be lists of names; it is damaged.")
        method = registry.config_class(str(values["method"].get("name"))).from_dict(values["method"])
        layers = {name: method.read_format(form) for form, names in values["layers"].items() for name in names}
        return cls(method, layers)

"""Export of a quantized network to the compressed-tensors schema, which other engines read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json
from diffaccel.quant.formats import LayerFormat
from diffaccel.quant.linear import QLinear
from diffaccel.quant.mixed.form import MixedFormat
from diffaccel.quant.plan import layers_of

_WORD = 4  # bytes of the int32 words that codes are packed into


def export_compressed_tensors(network: Any, folder: str | Path) -> Path:
    """Write a quantized network as one safetensors file and a ``config.json`` in the compressed-tensors schema.

    Linears keep their codes: "w8a8" becomes int-quantized, "w8a8_fp8" float-quantized, "w8a16", "w4a16" and "w4a8"
    pack-quantized, the last with the product of its two levels as scales. The schema has no quantized convolution:
    those are written dequantized.

    Args:
        network: a diffusers model with quantized linears, without adapters.
        folder: is made where it does not exist.

    Returns:
        The folder.

    Raises:
        DiffAccelError: for a network without quantized linears, or with adapters on them.
    """
    from safetensors.torch import save_file

    layers = {name: module for name, _, attribute, module in layers_of(network) if attribute != "base_layer"}
    quantized = {name: module for name, module in layers.items() if isinstance(module, QLinear)}
    if any(isinstance(getattr(module, "form", None), MixedFormat) for module in layers.values()):
        raise DiffAccelError(
            f"{type(network).__name__} has layers of mixed precision, whose packed codes and calibrated zero points "
            "the compressed-tensors schema does not have. Save it by save_pretrained."
        )
    if not quantized:
        raise DiffAccelError(
            f"{type(network).__name__} has no quantized linear layer to export. Quantize it first, and export it "
            "without adapters."
        )
    if few := next((name for name, module in quantized.items() if module.form.name == "low_bit"), None):
        raise DiffAccelError(
            f"'{few}' has real zeros beside its codes ({quantized[few].form}), which the compressed-tensors schema "
            "cannot hold. Save the model with save_pretrained."
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        owner = layers.get(name.rpartition(".")[0])
        if owner is None or name.endswith(".bias") or not hasattr(owner, "form"):
            tensors[name] = tensor.contiguous()
    for name, module in layers.items():
        if isinstance(module, QLinear):
            tensors |= {f"{name}.{key}": value for key, value in exported(module).items()}
        elif hasattr(module, "form"):  # a convolution
            tensors[f"{name}.weight"] = module.dequantize().contiguous()  # type: ignore[operator]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in network.config.items() if key != "quantization_config"}
    config = {"_class_name": type(network).__name__, **{k: v for k, v in config.items() if _is_json(v)}}
    ignored = [name for name, module in layers.items() if name not in quantized]
    write_json(folder / "config.json", {**config, "quantization_config": _schema(quantized, ignored)})
    return folder


def exported(layer: QLinear) -> dict[str, Tensor]:
    """Return the tensors of one layer in the schema, without its bias."""
    form = layer.form
    if form.name in ("w8a8", "w8a8_fp8"):
        return {"weight": layer.weight.detach(), "weight_scale": layer.weight_scale.detach()}
    scale = layer.weight_scale.detach()
    if form.name == "w4a8":
        scale = scale * layer.weight_multiplier
    return {
        "weight_packed": packed_words(layer.weight.detach(), form.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([layer.out_features, layer.in_features], dtype=torch.int64, device="cpu"),
    }


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes as int32 words, the first in the lowest bits, each shifted by half of its range to be positive."""
    shifted = codes.view(torch.uint8) ^ (0x88 if bits == 4 else 0x80)
    return F.pad(shifted, (0, -shifted.shape[1] % _WORD)).contiguous().view(torch.int32)


def _schema(quantized: dict[str, QLinear], ignored: list[str]) -> dict[str, Any]:
    names: dict[LayerFormat, list[str]] = {}
    for name, layer in quantized.items():
        names.setdefault(layer.form, []).append(name)
    groups = {f"group_{i}": {"targets": names[form], **_scheme(form)} for i, form in enumerate(names)}
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }


def _scheme(form: LayerFormat) -> dict[str, Any]:
    kind = "float" if form.name == "w8a8_fp8" else "int"
    grouping = {"strategy": "group", "group_size": form.group} if form.group else {"strategy": "channel"}
    weights = {"num_bits": form.bits, "type": kind, "symmetric": True, "dynamic": False, **grouping}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    formats = {"w8a8": "int-quantized", "w8a8_fp8": "float-quantized"}
    return {
        "weights": weights,
        "input_activations": inputs if form.activations else None,
        "output_activations": None,
        "format": formats.get(form.name, "pack-quantized"),
    }


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)

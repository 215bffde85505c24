"""The quantizer as diffusers calls it: ``from_pretrained`` quantizes on the fly, and loads what was quantized.

``import diffaccel.quant`` enters it into the two tables of ``diffusers.quantizers.auto``; nothing is patched.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.base import DiffusersConfig
from diffaccel.quant.formats import LayerFormat
from diffaccel.quant.layer import QuantizedLayer, check_stored, stored_parameter
from diffaccel.quant.lora_guard import guard, unguard
from diffaccel.quant.low_bit.linear import attach_time
from diffaccel.quant.low_bit.timesteps import detach
from diffaccel.quant.mixed.first_row import share_rows
from diffaccel.quant.options import QuantizationOptions, QuantMethod
from diffaccel.quant.plan import check_skips, layers_of, plan
from diffaccel.quant.stored import StoredQuantization
from diffaccel.quant.swap import empty_layer, quantized


class NetworkQuantizer(DiffusersQuantizer):  # type: ignore[misc, unused-ignore]
    """Quantizes a network's layers while it is loaded, or fills quantized layers from a file."""

    use_keep_in_fp32_modules = True  # without it diffusers casts layers that a model keeps in fp32
    is_serializable = True
    is_trainable = True
    is_compileable = True
    supports_parallel_loading = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        is_stored = isinstance(quantization_config, StoredQuantization)
        self.method: QuantizationOptions = quantization_config.method if is_stored else quantization_config
        self.layers: dict[str, LayerFormat] = quantization_config.layers if is_stored else {}
        if self.pre_quantized != is_stored:
            raise DiffAccelError(
                "A model that is quantized already is loaded without a quantization_config; its config.json says how."
            )
        self.dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse layers on disk, which are never read before they are quantized."""
        if isinstance(device_map, dict) and "disk" in device_map.values() and not self.pre_quantized:
            raise DiffAccelError(
                "device_map puts layers on disk, where they cannot be quantized. Quantize without it, save_pretrained, "
                "and load that."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep the dtype that the user asked for, and note it."""
        self.dtype = torch_dtype
        return torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype by which an automatic ``device_map`` counts bytes."""
        return torch.int8

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a file without codes or scales of a quantized layer."""
        if self.pre_quantized:
            needed = {f"{name}.{tensor}" for name, layer in self._quantized(model) for tensor in layer.stored}
            if missing := sorted(needed & set(missing_keys)):
                raise DiffAccelError(
                    f"The quantized checkpoint lacks {len(missing)} tensors, first '{missing[0]}'. Copy or quantize it "
                    "again."
                )
        return missing_keys

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether a tensor belongs to a quantized layer, and is no bias."""
        layer, _, tensor = param_name.rpartition(".")
        return layer in self.layers and tensor != "bias"

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        """Raise for a tensor of a file that has another shape than its layer."""
        raise DiffAccelError(
            f"'{param_name}' is {tuple(loaded.shape)} in the checkpoint and {tuple(current.shape)} in the model. The "
            "file belongs to another model, or is damaged."
        )

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Quantize a weight, or take a stored tensor as it is in the file.

        diffusers casts floating tensors to the model's dtype before it calls this; scales are taken from before that.
        """
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(module, QuantizedLayer):
            old = module._parameters[tensor]
            stored = state_dict[param_name]
            if old is None:
                raise DiffAccelError(f"'{param_name}' is no tensor of its layer's format, {module.form}.")
            check_stored(name, tensor, stored, tuple(old.shape), old.dtype)
            if old.ndim == 4 and not old.is_contiguous():  # files are contiguous, kernels read channels last
                stored = stored.contiguous(memory_format=torch.channels_last)
            setattr(module, tensor, stored_parameter(tensor, stored.to(target_device), module.form))
            return
        module.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
        try:
            layer = quantized(module, self.layers[name], self.method, name)
        except DiffAccelError as error:
            raise DiffAccelError(f"'{name}': {error}") from None
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            check_skips([model], self.method)
            kept = set(keep_in_fp32_modules or ())
            layers = plan(model, self.method)
            self.layers = {name: form for name, form in layers.items() if not kept & set(name.split("."))}
            return
        found = {name: (parent, attribute, module) for name, parent, attribute, module in layers_of(model)}
        if unknown := sorted(set(self.layers) - set(found)):
            raise DiffAccelError(
                f"config.json quantizes {len(unknown)} layers that {type(model).__name__} does not have, first "
                f"'{unknown[0]}'. It belongs to another model."
            )
        for name, form in self.layers.items():
            parent, attribute, module = found[name]
            layer = empty_layer(module, form, self.dtype or module.weight.dtype)  # type: ignore[arg-type]
            self.method.finish(layer)
            setattr(parent, attribute, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        share_rows(model)
        stored = StoredQuantization(self.method, self.layers)
        self.quantization_config = stored
        model.register_to_config(quantization_config=stored.to_dict())
        guard(model)
        attach_time(model)
        return model

    def _dequantize(self, model: Any) -> Any:
        """Replace quantized layers by plain ones with the dequantized weights."""
        for _, parent, attribute, module in list(layers_of(model)):
            if isinstance(module, QuantizedLayer):
                setattr(parent, attribute, module.plain())
        config = model._internal_dict
        model._internal_dict = type(config)({k: v for k, v in config.items() if k != "quantization_config"})
        unguard(model)
        detach(model)
        return model

    def _quantized(self, model: Any) -> list[tuple[str, QuantizedLayer]]:
        return [(name, module) for name, _, _, module in layers_of(model) if isinstance(module, QuantizedLayer)]


def register() -> None:
    """Enter the quantizer into the tables of diffusers; again is harmless."""
    auto.AUTO_QUANTIZER_MAPPING[QuantMethod.DIFFACCEL] = NetworkQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.DIFFACCEL] = DiffusersConfig

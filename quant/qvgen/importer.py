"""Networks of the published checkpoints of QVGen, which hold latent weights and quantizers beside them.

Of a quantized layer they have ``NAME.w`` and ``NAME.b``, scale and real zero of each row under
``NAME.wquantizer.scale`` and ``.zero_point``, and one logit of clipping a group under ``NAME.aquantizer.upper`` and
``.lower``. Their code multiplies the sigmoid of a logit by 0.95 once more: the factor of a range is the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.lora_guard import guard
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.linear import LowBitLinear, stored_tensors
from diffaccel.quant.plan import layers_of
from diffaccel.quant.qvgen.options import TrainedQuantization
from diffaccel.quant.stored import StoredQuantization
from diffaccel.quant.swap import remember

SECOND_CLIP = 0.95
Groups = Literal["last", "mean"]
_PARTS = ("w", "wquantizer.scale", "wquantizer.zero_point", "aquantizer.upper", "aquantizer.lower")


@torch.no_grad()
def import_published(
    network: Any, source: str | Path | Mapping[str, Tensor], config: TrainedQuantization, groups: Groups = "last"
) -> Any:
    """Give a network the codes and weights of a published checkpoint, in place.

    Args:
        network: of the class that was trained, such as ``WanTransformer3DModel``, with any weights.
        source: a safetensors file, or its tensors.
        config: ``QVGen.paper(weight_bits=..., act_bits=...)`` with the bits of the checkpoint, which it does not name.
        groups: their groups of timesteps are ``t mod 50`` of the first sample of a batch, which says nothing of the
            noise; "last" takes the last group for all, as their sampling does, "mean" the mean of all.

    Raises:
        DiffAccelError: for tensors that are missing, left over, of another shape, or not finite.
    """
    tensors = dict(_read(source))
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    found = {name: (parent, attribute, module) for name, parent, attribute, module in layers_of(network)}
    names = sorted(key.removesuffix(".wquantizer.scale") for key in tensors if key.endswith(".wquantizer.scale"))
    if not names:
        raise DiffAccelError("The checkpoint has no 'NAME.wquantizer.scale': it is none of QVGen's.")
    if unknown := [name for name in names if not isinstance(found.get(name, (0, 0, 0))[2], nn.Linear)]:
        raise DiffAccelError(
            f"The checkpoint quantizes {len(unknown)} layers that {type(network).__name__} does not have as linears, "
            f"first {', '.join(map(repr, unknown[:3]))}. It belongs to another model."
        )
    forms = {}
    for name in names:
        parent, attribute, module = found[name]
        layer = _layer(name, module, tensors, config, groups)
        config.finish(layer)
        setattr(parent, attribute, layer)
        forms[name] = layer.form
    _fill(network, tensors, set(names))
    remember(network, StoredQuantization(config, dict(forms)).to_dict())
    guard(network)
    return network


def _read(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(source)
    except (SafetensorError, OSError) as error:
        raise DiffAccelError(f"'{source}' is no safetensors file that can be read ({error}).") from error


def _layer(
    name: str, module: Any, tensors: dict[str, Tensor], config: TrainedQuantization, groups: Groups
) -> LowBitLinear:
    """Take one layer's tensors out of a checkpoint, and return it."""
    if missing := [part for part in _PARTS if f"{name}.{part}" not in tensors]:
        raise DiffAccelError(f"The checkpoint lacks '{name}.{missing[0]}'. Copy it again.")
    weight, scale, zero, upper, lower = (tensors.pop(f"{name}.{part}").float() for part in _PARTS)
    n, k = module.out_features, module.in_features
    if tuple(weight.shape) != (n, k) or scale.numel() != n or zero.numel() != n:
        raise DiffAccelError(
            f"'{name}' is {tuple(weight.shape)} with {scale.numel()} scales in the checkpoint and {(n, k)} in the "
            "network. It belongs to another model."
        )
    form = LowBit(weight_bits=config.weight_bits, act_bits=config.act_bits, dense=config.dense)
    form.check(k)
    try:
        stored = stored_tensors(weight, scale.reshape(n, 1), zero.reshape(n, 1), form)
    except DiffAccelError as error:
        raise DiffAccelError(f"'{name}': {error}") from None
    clips = torch.stack([SECOND_CLIP * torch.sigmoid(logits.reshape(-1)) for logits in (lower, upper)], dim=1)
    stored["act_clip"] = clips[-1:] if groups == "last" else clips.mean(dim=0, keepdim=True)
    device, dtype = module.weight.device, module.weight.dtype
    bias = tensors.pop(f"{name}.b", None)
    if (bias is None) != (module.bias is None):
        raise DiffAccelError(
            f"'{name}' has {'no ' if bias is None else 'a '}bias in the checkpoint alone, or not in it."
        )
    own = None if bias is None else nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return LowBitLinear(k, n, form, {key: value.to(device) for key, value in stored.items()}, own, dtype)


def _fill(network: nn.Module, tensors: dict[str, Tensor], quantized: set[str]) -> None:
    """Copy what is not quantized, and raise for what is missing or left over."""
    own = {
        name: value for name, value in network.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in quantized
    }  # fmt: skip
    missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or left:
        raise DiffAccelError(
            f"The checkpoint does not fit {type(network).__name__}: it lacks {len(missing)} tensors "
            f"({', '.join(missing[:3]) or 'none'}) and has {len(left)} more ({', '.join(left[:3]) or 'none'})."
        )
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise DiffAccelError(
                f"'{name}' is {tuple(tensors[name].shape)} in the checkpoint and {tuple(value.shape)} in the network."
            )
        value.data.copy_(tensors[name])

"""The layers that a plan is made for, the group of each, and joined inputs of skip connections.

Content layers (feed-forward and cross-attention) change what a picture shows, quality layers how cleanly: their
sensitivities are measured differently and never compared (arXiv 2405.17873, section 4.2). For transformers of joint
attention, our extension: the projections of the text and both linears of a single block's feed-forward are content.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.quant.layer import QuantizedLayer
from diffaccel.quant.plan import UNLISTED, layers_of

LayerGroup = Literal["content", "quality"]
Layers = Literal["facts", "all"]
_CONTENT = {
    "ff", "ffn", "attn2", "ff_context", "proj_mlp", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "to_added_qkv",
}  # fmt: skip
_SINGLE_OUT = re.compile(r"single_transformer_blocks\.\d+\.proj_out")
_READS_TEXT = re.compile(r"(?:.*\.)?attn2\.(?:to_k|to_v|to_kv)")
_JOINED = re.compile(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(?:conv1|conv_shortcut)")


@dataclass(frozen=True)
class LayerToPlan:
    """One layer that may have fewer bits.

    Attributes:
        group: whose sensitivities it is compared with.
        split: input channels that come first in an input of two joined parts; 0 where it is one.
        keeps_input: whether only its weight is quantized: one that runs once a sample, or as the user asks.
        reads_text: whether its input may be the text states.
        least: fewest bits that its weight may have.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    group: LayerGroup
    split: int = 0
    keeps_input: bool = False
    reads_text: bool = False
    least: int = 2

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.module.weight.numel()

    @property
    def weight_choices(self) -> tuple[int, ...]:
        """Bits that its weight may have: 2 only where it is content."""
        least = max(self.least, 2 if self.group == "content" else 4)
        return tuple(bits for bits in (2, 4, 8) if bits >= least)


def group_of(name: str) -> LayerGroup:
    """Return the group of a layer by the parts of its name."""
    is_content = bool(_CONTENT & set(name.split("."))) or _SINGLE_OUT.fullmatch(name) is not None
    return "content" if is_content else "quality"


def candidates(network: nn.Module, config: Any) -> dict[str, LayerToPlan]:
    """Return the layers of a network that are planned, by name.

    Args:
        config: a ``MixDQ``, whose ``planned``, ``skip``, ``modulation`` and ``convs`` say which.

    Raises:
        DiffAccelError: for a network that is quantized already, or without a layer to plan.
    """
    modules = [(name, module) for name, _, _, module in layers_of(network)]
    if done := next((name for name, module in modules if isinstance(module, QuantizedLayer)), None):
        raise DiffAccelError(
            f"{type(network).__name__} is quantized already ('{done}'). Load the original weights, or "
            "diffaccel.remove(pipe) first."
        )
    uses = Counter(id(module.weight) for _, module in modules)
    kept = _keeper(network, config.planned)
    found = {}
    for name, module in modules:
        is_plain = type(module) in (nn.Linear, nn.Conv2d) and uses[id(module.weight)] == 1 and not config.skips(name)
        is_modulation = _is_modulation(network, name)
        is_left = kept(name) and not (is_modulation and config.modulation != "keep")
        if not is_plain or is_left or (isinstance(module, nn.Conv2d) and config.convs == "keep"):
            continue
        found[name] = _candidate(network, config, name, module, is_modulation)
    if not found:
        raise DiffAccelError(f"{type(network).__name__} has no layer to plan: all are left alone. Skip fewer.")
    return found


def _candidate(network: nn.Module, config: Any, name: str, module: Any, is_modulation: bool) -> LayerToPlan:
    is_conv = isinstance(module, nn.Conv2d)
    split = _split(network, name) if is_conv and module.groups == 1 else 0
    return LayerToPlan(
        name, module, group_of(name), split,
        keeps_input=is_modulation or (is_conv and config.convs == "weights"),
        reads_text=_READS_TEXT.fullmatch(name) is not None,
        least=8 if is_modulation and config.modulation == "int8" else 2,
    )  # fmt: skip


def _keeper(network: nn.Module, layers: Layers) -> Any:
    """Return the function that says whether a layer stays in high precision, by its name."""
    if layers == "all":
        return lambda name: False
    try:
        return facts_of(network).keeps
    except DiffAccelError:
        return lambda name: any(re.fullmatch(pattern, name) for pattern in UNLISTED)


def _is_modulation(network: nn.Module, name: str) -> bool:
    try:
        return re.fullmatch(facts_of(network).modulation, name) is not None
    except DiffAccelError:
        return False


def _split(network: Any, name: str) -> int:
    """Return the channels of a UNet's own features in an input that a skip connection is joined to; 0 without one."""
    match = _JOINED.fullmatch(name)
    if match is None or not hasattr(network, "down_blocks"):
        return 0
    block, resnet = int(match[1]), int(match[2])
    if resnet:
        before = network.up_blocks[block].resnets[resnet - 1]
    elif block:
        before = network.up_blocks[block - 1].resnets[-1]
    else:
        before = (getattr(network, "mid_block", None) or network.down_blocks[-1]).resnets[-1]
    own = int(before.out_channels)
    return own if own < network.get_submodule(name).in_channels else 0

"""Whether the parts of a block are as their classes have them, so that another order of their steps is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module) -> bool:
    """Return whether nothing but the forward of its class runs when a module is called."""
    attributes = vars(module)
    if not has_own_forward(module) or attributes.get("_compiled_call_impl") is not None:
        return False
    return not any(attributes.get(name) for name in _HOOKS)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is that of its class, which tools that are gone may have left on the module."""
    return is_own(vars(module).get("forward"), module)


def is_own(forward: Any, module: nn.Module) -> bool:
    """Return whether a forward is that of a module's class, or None."""
    if forward is None:
        return True
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def is_bare_norm(module: nn.Module) -> bool:
    """Return whether a module is torch's layer norm without a weight."""
    return type(module) is nn.LayerNorm and module.weight is None and module.bias is None and is_plain(module)


def is_head_norm(module: nn.Module) -> bool:
    """Return whether a module is torch's RMS norm with a weight, in memory where it computes."""
    return type(module) is nn.RMSNorm and module.weight is not None and module.eps is not None and is_plain(module)


def is_idle_dropout(module: nn.Module) -> bool:
    """Return whether a module is a dropout that drops nothing."""
    return type(module) is nn.Dropout and (not module.training or module.p == 0.0) and is_plain(module)


def reason_of_call(x: Tensor) -> str | None:
    """Return why a call is left to the block's own forward, whatever the block; None where it is not."""
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if type(x) is not Tensor:
        return f"its tokens are a {type(x).__name__}"
    return None


def reason_of_processor(attention: Any, kind: Any) -> str | None:
    """Return why an attention is left to its own processor; None where it is the stock one, on one device."""
    processor = attention.processor
    if type(processor) is not kind:
        return f"its attention has a {type(processor).__name__}"
    if processor._parallel_config is not None:
        return "its attention is split over devices"
    return None

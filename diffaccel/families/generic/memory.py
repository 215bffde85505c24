"""What was found by watching the calls of a pipeline, for later calls of the same kind.

Calls are of one kind where all that may change what the loop does is the same: the pipeline's components, their
configs and the structure of its networks (which adapters, caches and other attention change), its public attributes,
and the arguments, of which prompts, tensors and pictures count by number, shape and dtype alone. What was found is
checked at the first step of each later call, and found anew where it does not hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.families.generic.findings import Findings
from diffaccel.families.generic.stand_ins import NO_DENOISERS
from diffaccel.families.generic.watching import NotIdentified
from diffaccel.modules.call_class import stock_class

MOST_KINDS = 32  # of one pipeline; the oldest is forgotten
MOST_NUMBERS = 1000  # of a list or tensor of numbers that counts by its values, such as timesteps

# by pipeline and kind of call: findings, the reason why there are none, or None where they did not hold once
_KNOWN: WeakKeyDictionary[Any, dict[Hashable, Findings | str | None]] = WeakKeyDictionary()


class _Unknown(Exception):
    """An argument whose kind is unknown."""


class CallMemory:
    """What is known of the kind of one call, and what is learned of it."""

    def __init__(self, pipe: Any, call: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._known = _KNOWN.setdefault(pipe, {})
        try:
            kinds = tuple((name, _kind(name, value)) for name, value in sorted(arguments.items()))
            self._kind: Hashable = (call, kind_of_parts(pipe), kinds)
        except _Unknown:
            self._kind = None

    def findings(self) -> Findings | None:
        """Return what was found at an earlier call of this kind; None where the call must be watched.

        Raises:
            NotIdentified: with the reason why nothing was found there.
        """
        known = self._known.get(self._kind)
        if isinstance(known, str):
            raise NotIdentified(known)
        return known

    def keep(self, result: Findings | NotIdentified) -> None:
        """Keep what was found, or why nothing was, unless an earlier finding for this kind did not hold."""
        if self._kind is None or self._known.get(self._kind, result) is None:
            return
        if isinstance(result, Findings):  # of the constants, which may be large, later calls need the names
            names = [dict.fromkeys(constant) for constant in result.constants]
            self._known[self._kind] = replace(result, constants=names)
        else:
            self._known[self._kind] = str(result)
        while len(self._known) > MOST_KINDS:
            self._known.pop(next(iter(self._known)))

    def forget(self) -> None:
        """Never trust findings for this kind again: something unknown tells its calls apart."""
        self._known[self._kind] = None


def kind_of_parts(pipe: Any) -> Hashable:
    """Return what tells apart the states of a pipeline in which its calls may differ."""
    config = getattr(pipe, "config", {})
    parts = [(name, _part(name, part)) for name, part in vars(pipe).items() if not name.startswith("_")]
    device, in_order = str(getattr(pipe, "_execution_device", "")), tuple(sorted(parts, key=_name))
    return stock_class(type(pipe)), device, _text(config), in_order


def _name(item: tuple[str, Any]) -> str:
    return item[0]


def _part(name: str, part: Any) -> Hashable:
    """Return the kind of one public attribute of a pipeline: its identity, config and structure, or its value."""
    if part is None or isinstance(part, bool | int | float | str):
        return type(part), part
    try:
        identity: Hashable = weakref.ref(part)
        hash(identity)
    except TypeError:  # a container
        return type(part), repr(part)
    is_network = isinstance(part, torch.nn.Module) and not any(word in name for word in NO_DENOISERS)
    return identity, _text(getattr(part, "config", {})), _structure(part) if is_network else None


def _text(config: Any) -> str:
    """Return a config of diffusers as text; those of other libraries do not change a loop."""
    return repr(sorted(config.items(), key=_name)) if isinstance(config, dict) else ""


def _structure(network: torch.nn.Module) -> int:
    """Hash the classes of a network's modules, what was put in the place of their methods, and its adapters."""
    modules = [
        (
            type(module),
            type(vars(module).get("processor")),
            "forward" in vars(module),
            "_diffusers_hook" in vars(module),
        )
        for module in network.modules()
    ]
    dtype = next((parameter.dtype for parameter in network.parameters()), None)
    return hash((tuple(modules), dtype, tuple(getattr(network, "peft_config", ()))))


def _kind(name: str, value: Any) -> Hashable:
    """Return the kind of an argument: the value of an option, the form of anything else.

    Raises:
        _Unknown: for objects of other classes.
    """
    if isinstance(value, str):
        return bool(value) if "prompt" in name else value
    if value is None or isinstance(value, bool | int | float | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, Tensor | np.ndarray):
        is_short = value.ndim < 2 and int(np.prod(value.shape)) <= MOST_NUMBERS
        numbers = str(value.tolist()) if is_short else ""
        return type(value), tuple(value.shape), str(value.dtype), str(getattr(value, "device", "")), numbers
    if isinstance(value, Image.Image):
        return value.size, value.mode
    if isinstance(value, torch.Generator):
        return type(value), str(value.device)
    if isinstance(value, list | tuple):
        return type(value), tuple(_kind(name, item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _kind(str(key), item)) for key, item in sorted(value.items(), key=lambda item: str(item[0])))
    if callable(value) and "callback" in name:
        return "callback", tuple(getattr(value, "tensor_inputs", None) or ())
    raise _Unknown

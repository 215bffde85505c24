"""Functions of the user's as rewards."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.reward import Reward

ATTRIBUTES = ("input", "batch_size", "device", "differentiable", "needs_prompts")


def of_callable(function: Any, name: str = "") -> Reward:
    """A callable ``(images, prompts) -> scores`` with those attributes of a reward that it has.

    Raises:
        DiffAccelError: for what cannot be called, and attributes that a reward cannot have.
    """
    if not callable(function):
        raise DiffAccelError(
            f"A reward must be a name, or callable with images and prompts; got {type(function).__name__}."
        )
    return Reward(name=name or name_of(function), function=function, **attributes(function))


def attributes(function: Any) -> dict[str, Any]:
    """What a callable says about itself, as fields of a reward."""
    found = {key: value for key in ATTRIBUTES if (value := getattr(function, key, None)) is not None}
    if "device" in found:
        try:
            found["device"] = torch.device(found["device"])
        except (RuntimeError, TypeError) as error:
            raise DiffAccelError(
                f"The device of the reward '{name_of(function)}' is {found['device']!r}; write it as torch does, "
                "such as 'cuda:1'."
            ) from error
    return found


def name_of(function: Any) -> str:
    """Its ``name``, its name in the code, or its type's."""
    return str(getattr(function, "name", "") or getattr(function, "__name__", "") or type(function).__name__)


def imported(text: str) -> Any:
    """What ``py:module:function`` names.

    Raises:
        DiffAccelError: where it names nothing, or cannot be imported.
    """
    module, _, name = text.removeprefix("py:").partition(":")
    if not module or not name:
        raise DiffAccelError(f"'{text}' names no function. Write py:module:function, such as py:my_rewards:sharpness.")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DiffAccelError(f"The reward '{text}' cannot be imported ({error}). Is it on PYTHONPATH?") from error

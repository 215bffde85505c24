"""The user's own functions as rewards."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.identity import digest
from diffaccel.samplers.rewards.reward import Reward

ATTRIBUTES = ("input", "batch_size", "device", "differentiable", "needs_prompts", "identity")


def from_callable(function: Any, name: str = "") -> Reward:
    """Make a reward of a callable ``(images, prompts) -> scores``, with the attributes of a reward that it has.

    An object with ``compare(images_a, images_b, prompts)`` is a judge of pairs, whether it can be called or not.

    Raises:
        DiffAccelError: for an object that neither scores nor compares, and for attributes with invalid values.
    """
    compare = getattr(function, "compare", None)
    if compare is not None and not callable(compare):
        raise DiffAccelError(f"The compare of the reward '{reward_name(function)}' cannot be called.")
    if not callable(function) and compare is None:
        raise DiffAccelError(
            f"A reward must be a name, callable with images and prompts, or have compare(images_a, images_b, prompts); "
            f"got {type(function).__name__}."
        )
    name, attributes = name or reward_name(function), reward_attributes(function)
    if callable(function):
        return Reward(name=name, function=function, compare=compare, **attributes)
    attributes.setdefault("identity", partial(digest, name, compare))
    return Reward(name=name, function=_says_nothing, compare=compare, scores=False, **attributes)


def _says_nothing(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.zeros(len(images), dtype=torch.float64, device="cpu")


def reward_attributes(function: Any) -> dict[str, Any]:
    """Return the fields of a reward that a callable has as attributes."""
    attributes = {key: value for key in ATTRIBUTES if (value := getattr(function, key, None)) is not None}
    if "device" in attributes:
        try:
            attributes["device"] = torch.device(attributes["device"])
        except (RuntimeError, TypeError) as error:
            raise DiffAccelError(
                f"The device of the reward '{reward_name(function)}' is {attributes['device']!r}; write it as torch "
                "does, such as 'cuda:1'."
            ) from error
    return attributes


def reward_name(function: Any) -> str:
    """Return a callable's attribute ``name``, its ``__name__``, or the name of its type."""
    return str(getattr(function, "name", "") or getattr(function, "__name__", "") or type(function).__name__)


def import_function(text: str) -> Any:
    """Import the function that ``py:module:function`` names.

    Raises:
        DiffAccelError: where the name is incomplete or cannot be imported.
    """
    module, _, name = text.removeprefix("py:").partition(":")
    if not module or not name:
        raise DiffAccelError(f"'{text}' names no function. Write py:module:function, such as py:my_rewards:sharpness.")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DiffAccelError(f"The reward '{text}' cannot be imported ({error}). Is it on PYTHONPATH?") from error

"""Rewards for inference-time search: what a better picture scores higher (Kim et al., arXiv 2503.19385).

>>> from diffaccel.samplers import rewards
>>> reward = rewards.resolve("clip:emoji-clip-reward + 0.2*compress", device="cuda")
>>> reward(images, prompts)          # (b, 3, H, W) in [0, 1] to (b,) float64
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.samplers.rewards import clip, compress, vqa
from diffaccel.samplers.rewards.callables import from_callable, import_function
from diffaccel.samplers.rewards.counting import counts
from diffaccel.samplers.rewards.identity import digest, weights
from diffaccel.samplers.rewards.preference import published
from diffaccel.samplers.rewards.reward import Reward
from diffaccel.samplers.rewards.sums import terms, weighted

__all__ = ["KNOWN", "Reward", "counts", "digest", "resolve", "weighted", "weights"]

# Name: a function of the text after the name's colon, a device, and the name of the model that makes the pictures. All
# have this one signature, though most ignore the model and some the device.
KNOWN: dict[str, Callable[[str, torch.device, str], Reward]] = {
    "clip": clip.reward,
    "compress": compress.reward,
    "vqa": vqa.reward,
    **{name: partial(published, name) for name in ("aesthetic", "hpsv2", "image-reward", "pickscore")},
}


def resolve(reward: Any, *, device: torch.device | str, model: str = "") -> Reward:
    """Turn a name, a sum of names or a callable into a reward.

    Args:
        reward: a :class:`Reward`; a callable ``(images, prompts) -> scores``, whose attributes ``name``, ``input``,
            ``batch_size``, ``device``, ``differentiable``, ``needs_prompts`` and ``identity`` are used where it has
            them; or text: a name of :data:`KNOWN`, with its argument after a colon, ``py:module:function``, or a
            weighted sum of these such as ``clip + 0.2*compress``.
        device: device of a named reward's network.
        model: name or folder of the model that makes the pictures; only ``clip`` needs it.

    Raises:
        MissingWeights: where a network's weights are not found.
        DiffAccelError: for an unknown name, a function that cannot be imported, and any other object.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        target = torch.device(device)
        total = weighted([(weight, _named(name, target, model)) for weight, name in terms(reward)])
        return replace(total, source=partial(resolve, reward, device=target, model=model))
    return from_callable(reward)


def _named(text: str, device: torch.device, model: str) -> Reward:
    name, _, argument = text.partition(":")
    if name == "py":
        return from_callable(import_function(text), text)
    if name not in KNOWN and re.search(r"[+*]", name):
        raise DiffAccelError(f"'{text}' is no reward. Write a sum with spaces around its signs: clip + 0.2*compress.")
    if name not in KNOWN:
        raise unknown("reward", text, (*KNOWN, "py:module:function"))
    return KNOWN[name](argument, device, model)


def __dir__() -> list[str]:
    return sorted(__all__)

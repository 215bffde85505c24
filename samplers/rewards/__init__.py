"""Rewards for inference-time search: what a better picture scores higher (Kim et al., arXiv 2503.19385).

>>> from diffaccel.samplers import rewards
>>> reward = rewards.resolve("clip:emoji-clip-reward + 0.2*compress", device="cuda")
>>> reward(images, prompts)          # (b, 3, H, W) in [0, 1] to (b,) float64
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.samplers.rewards import clip, compress, vqa
from diffaccel.samplers.rewards.callables import imported, of_callable
from diffaccel.samplers.rewards.counting import counts
from diffaccel.samplers.rewards.preference import published
from diffaccel.samplers.rewards.reward import Reward
from diffaccel.samplers.rewards.sums import terms, weighted

__all__ = ["KNOWN", "Reward", "counts", "resolve", "weighted"]

# name: from the text after its colon, a device and the model's name to a reward
KNOWN: dict[str, Callable[[str, torch.device, str], Reward]] = {
    "clip": clip.reward,
    "compress": compress.reward,
    "vqa": vqa.reward,
    **{name: partial(published, name) for name in ("aesthetic", "hpsv2", "image-reward", "pickscore")},
}


def resolve(what: Any, *, device: torch.device | str, model: str = "") -> Reward:
    """The reward that is meant.

    Args:
        what: a :class:`Reward`; a callable ``(images, prompts) -> scores``, whose attributes ``name``, ``input``,
            ``batch_size``, ``device``, ``differentiable`` and ``needs_prompts`` count where it has them; or text: a
            name of :data:`KNOWN`, with what belongs to it after a colon, ``py:module:function``, or a weighted sum of
            these such as ``clip + 0.2*compress``.
        device: of a named reward's network.
        model: name or folder of the model that makes the pictures, for ``clip`` alone.

    Raises:
        MissingWeights: where a network's weights are not found.
        DiffAccelError: for an unknown name, a function that cannot be imported, and what is none of these.
    """
    if isinstance(what, Reward):
        return what
    if isinstance(what, str):
        where = torch.device(device)
        return weighted([(weight, _named(name, where, model)) for weight, name in terms(what)])
    return of_callable(what)


def _named(text: str, device: torch.device, model: str) -> Reward:
    name, _, argument = text.partition(":")
    if name == "py":
        return of_callable(imported(text), text)
    if name not in KNOWN and re.search(r"[+*]", name):
        raise DiffAccelError(f"'{text}' is no reward. Write a sum with spaces around its signs: clip + 0.2*compress.")
    if name not in KNOWN:
        raise unknown("reward", text, (*KNOWN, "py:module:function"))
    return KNOWN[name](argument, device, model)

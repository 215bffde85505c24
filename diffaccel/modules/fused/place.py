"""Where the forward of a block's class lies: on the block, or below the hooks that offloading has put on it.

Offloading of groups hooks every module with parameters of its own, as Wan's blocks have, and of whole blocks every
block. Its hooks keep the forward that they call; another one in that place runs between the same hooks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import nn


class ForwardPlace(NamedTuple):
    """A dictionary and the key of a forward in it."""

    values: dict[str, Any]
    key: str

    @property
    def forward(self) -> Any:
        """The forward that lies there, or None for that of the class."""
        return self.values.get(self.key)


def places(block: nn.Module) -> list[ForwardPlace]:
    """Return where a forward of a block may lie: on it, and below each hook of diffusers and of accelerate."""
    references = getattr(vars(block).get("_diffusers_hook"), "_fn_refs", ())
    below = [ForwardPlace(vars(reference), "forward") for reference in references]
    return [ForwardPlace(vars(block), "forward"), *below, ForwardPlace(vars(block), "_old_forward")]


def innermost(block: nn.Module) -> ForwardPlace:
    """Return where the forward lies that all hooks on a block come down to.

    A hook that replaces the forward, as caches do, keeps the place: what lies below it is not always called.
    """
    place, *below, old = places(block)
    if below and _is_hook(place.forward, "diffusers.hooks.hooks"):
        if any(kept.values.get("original_forward") is not None for kept in below):
            return place
        place = below[0]
    return old if _is_hook(place.forward, "accelerate.hooks") else place


def _is_hook(forward: Any, module: str) -> bool:
    return isinstance(forward, partial) and getattr(forward.func, "__module__", None) == module

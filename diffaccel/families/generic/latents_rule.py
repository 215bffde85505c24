"""The network argument that holds the latents which the scheduler steps, and its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.families.generic.watching import NotIdentified, Turn

CONDITION = "condition_latents"  # key of the constant part beside the latents in their argument


@dataclass(frozen=True)
class LatentsRule:
    """The map from latents ``(R, ...)`` in the pipeline's own layout to the network's input.

    Attributes:
        arg: the argument's name.
        copies: number of repetitions of the batch, one per branch of a joint call.
        dtype: of the network's input.
        item_shape: shape of one sample's tensor where the network takes a list of them, else None.
        axis: axis along which constant condition latents follow the latents, or None.
    """

    arg: str
    copies: int
    dtype: torch.dtype
    item_shape: torch.Size | None = None
    axis: int | None = None

    def pack(self, x: Tensor, condition: Tensor | None) -> Any:
        """Return the network's argument for rows ``x``."""
        if self.item_shape is not None:
            return [row.reshape(self.item_shape) for row in x]
        return x if condition is None or self.axis is None else torch.cat([x, condition.to(x.dtype)], dim=self.axis)

    def condition(self, value: Any, row_shape: torch.Size) -> Tensor | None:
        """Return the condition latents in a recorded argument, or None."""
        if self.axis is None:
            return None
        length = row_shape[self.axis - 1]
        return value.narrow(self.axis, length, value.shape[self.axis] - length)

    def check(self, value: Any, sample: Tensor, step: int) -> None:
        """Raise when a recorded argument is not this map of ``sample``."""
        if _match(self.arg, value, sample) != self:
            raise NotIdentified(
                f"its network's argument '{self.arg}' does not hold the scheduler's latents at step {step}."
            )


def find_latents(turn: Turn) -> LatentsRule:
    """Return the rule of the argument that holds the latents which the scheduler steps in ``turn``."""
    for name, value in turn.calls[0].items():
        rule = _match(name, value, turn.sample)
        if rule is not None:
            return rule
    shapes = {k: tuple(v.shape) for k, v in turn.calls[0].items() if isinstance(v, Tensor) and v.ndim > 2}
    raise NotIdentified(
        f"none of its network's arguments holds the latents {tuple(turn.sample.shape)} that its scheduler steps; it is "
        f"called with {', '.join(f'{k} {v}' for k, v in shapes.items()) or 'no latents'}."
    )


def _match(name: str, value: Any, sample: Tensor) -> LatentsRule | None:
    """Return the rule by which an argument was made of ``sample``, or None."""
    if isinstance(value, list | tuple):
        fits = value and all(isinstance(item, Tensor) and item.numel() == sample[0].numel() for item in value)
        if not fits or len({item.shape for item in value}) > 1:
            return None
        stacked = _match(name, torch.stack(list(value)).reshape(len(value), *sample.shape[1:]), sample)
        return stacked and LatentsRule(name, stacked.copies, stacked.dtype, value[0].shape)
    if not isinstance(value, Tensor) or value.ndim != sample.ndim or len(value) % len(sample):
        return None
    copies = len(value) // len(sample)
    longer_axes = [axis for axis in range(1, value.ndim) if value.shape[axis] != sample.shape[axis]]
    axis = longer_axes[0] if longer_axes else None
    latents = value
    if axis is not None:
        # condition channels come second or last, condition tokens second; a longer picture or clip is something else
        if len(longer_axes) > 1 or axis not in (1, value.ndim - 1) or value.shape[axis] < sample.shape[axis]:
            return None
        latents = value.narrow(axis, 0, sample.shape[axis])
    expected = torch.cat([sample.to(value.dtype)] * copies)
    if not torch.equal(latents, expected):
        return None
    return LatentsRule(name, copies, value.dtype, None, axis)

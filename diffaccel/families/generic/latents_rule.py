"""Where a network's arguments hold the latents that the scheduler steps, and in which shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.families.generic.watching import NotIdentified, Turn

CONDITION = "condition_latents"  # what stands beside the latents in their argument


@dataclass(frozen=True)
class LatentsRule:
    """How the network's input is made of latents ``(R, ...)`` in the pipeline's own layout.

    Attributes:
        arg: the argument's name.
        copies: how often the batch is repeated, once per branch of a joint call.
        item_shape: of one sample's tensor where the network takes a list of them, else None.
        axis: along which condition latents follow, constant over the steps, else None.
    """

    arg: str
    copies: int
    dtype: torch.dtype
    item_shape: torch.Size | None = None
    axis: int | None = None

    def pack(self, x: Tensor, condition: Tensor | None) -> Any:
        """The network's argument for rows ``x``."""
        if self.item_shape is not None:
            return [row.reshape(self.item_shape) for row in x]
        return x if condition is None or self.axis is None else torch.cat([x, condition.to(x.dtype)], dim=self.axis)

    def condition(self, value: Any, row_shape: torch.Size) -> Tensor | None:
        """The condition latents of a recorded argument."""
        if self.axis is None:
            return None
        length = row_shape[self.axis - 1]
        return value.narrow(self.axis, length, value.shape[self.axis] - length)

    def check(self, value: Any, sample: Tensor, step: int) -> None:
        """Raise when a recorded argument is not made of ``sample`` so."""
        found = _match(self.arg, value, sample)
        if found != self:
            raise NotIdentified(
                f"its network's argument '{self.arg}' does not hold the scheduler's latents at step {step}."
            )


def find_latents(turn: Turn) -> LatentsRule:
    """The argument that holds what the scheduler steps in ``turn``."""
    for name, value in turn.calls[0].items():
        found = _match(name, value, turn.sample)
        if found is not None:
            return found
    shapes = {k: tuple(v.shape) for k, v in turn.calls[0].items() if isinstance(v, Tensor) and v.ndim > 2}
    raise NotIdentified(
        f"none of its network's arguments holds the latents {tuple(turn.sample.shape)} that its scheduler steps; it is "
        f"called with {', '.join(f'{k} {v}' for k, v in shapes.items()) or 'no latents'}."
    )


def _match(name: str, value: Any, sample: Tensor) -> LatentsRule | None:
    if isinstance(value, list | tuple):
        same = value and all(isinstance(v, Tensor) and v.numel() == sample[0].numel() for v in value)
        if not same or len({v.shape for v in value}) > 1:
            return None
        whole = _match(name, torch.stack(list(value)).reshape(len(value), *sample.shape[1:]), sample)
        return whole and LatentsRule(name, whole.copies, whole.dtype, value[0].shape)
    if not isinstance(value, Tensor) or value.ndim != sample.ndim or len(value) % len(sample):
        return None
    copies, longer = len(value) // len(sample), [i for i in range(1, value.ndim) if value.shape[i] != sample.shape[i]]
    start = value
    if longer:
        # channels follow the batch or come last, tokens follow the batch; a longer picture or clip is something else
        if len(longer) > 1 or longer[0] not in (1, value.ndim - 1) or value.shape[longer[0]] < sample.shape[longer[0]]:
            return None
        start = value.narrow(longer[0], 0, sample.shape[longer[0]])
    expected = torch.cat([sample.to(value.dtype)] * copies)
    if not torch.equal(start, expected):
        return None
    return LatentsRule(name, copies, value.dtype, None, longer[0] if longer else None)

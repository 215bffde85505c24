"""Keys and values of the frames that attention looks back at: a ring of fixed memory, whose addresses never change.

A frame's place in the ring is its id modulo the number of places; who may see a place is told by the ids alone, since
attention does not depend on the order of keys. Keys are kept before rotation, and a second time rotated to their
frame's time since ``base``, which moves along: angles stay small however long a video gets (arXiv 2104.09864).
"""

from __future__ import annotations

import math
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError

EMPTY = -(1 << 40)  # id of a place without a frame, outside of every window
REBASE = 1024  # frames after which keys are rotated anew, from the kept ones
_FORMAT = 1


class RingNetwork(Protocol):
    """What the ring must know of a network.

    Attributes:
        tokens: number of tokens of a frame.
    """

    tokens: int

    @property
    def key_sizes(self) -> tuple[int, int, int]:
        """Numbers of layers and heads, and the channels of a head."""

    @property
    def key_weight(self) -> Tensor:
        """A weight that has the dtype and device of keys."""

    def rotate_keys(self, keys: Tensor, times: Tensor) -> Tensor:
        """Return keys ``(B, heads, T * tokens, head_dim)`` of frames, rotated to their times ``(T,)``."""


Network = TypeVar("Network", bound=RingNetwork)


class FrameCache(Generic[Network]):
    """The ring of one model, dtype, device and batch size.

    Args:
        model: whose layers' keys and values are kept.
        batch: number of videos.
        window: number of frames that attention spans, the queried one included.
        spare: places beyond ``window - 1``: the frames that may be written before the oldest ones leave, and that
            :meth:`rollback` can take back.
        drafts: maximum number of frames that are drawn together; they have places of their own behind the ring.

    Attributes:
        keys: ``(layers, B, heads, places * tokens, head_dim)`` before rotation, of the ring.
        rotated: of that shape and after rotation, with the places of drafts behind the ring.
        values: as ``rotated``.
        ids: ``(places,)``, the frame in each place of the ring; on the device.
        count: number of frames written so far, which is the next frame's id.
        base: id from which rotations count time; ``device_base`` is the same number on the device.
    """

    @torch.inference_mode(False)  # its memory is written in any mode later
    def __init__(self, model: Network, batch: int, window: int, spare: int, drafts: int) -> None:
        if window < 2:
            raise DiffAccelError(f"window is {window}; it must be 2 (the queried frame and one before it) or more.")
        weight = model.key_weight
        self.model, self.batch, self.window, self.drafts = model, batch, window, drafts
        self.places, self.tokens = window - 1 + spare, model.tokens
        self.dtype, self.device = weight.dtype, weight.device
        layers, heads, dim = model.key_sizes
        shape = (layers, batch, heads, self.places * self.tokens)
        wide = (*shape[:3], (self.places + drafts) * self.tokens)
        try:
            self.keys = torch.zeros(*shape, dim, dtype=self.dtype, device=self.device)
            self.rotated = torch.zeros(*wide, dim, dtype=self.dtype, device=self.device)
            self.values = torch.zeros_like(self.rotated)
        except RuntimeError as error:  # of any device, and of more than a number of bytes can be
            size = math.prod(shape) * dim + 2 * math.prod(wide) * dim
            raise DiffAccelError(
                f"A window of {window} frames needs {size * weight.element_size() / 2**30:.3g} GiB on {self.device}, "
                "which are not there. Take a smaller window, fewer drafts or fewer videos."
            ) from error
        self.ids = torch.full((self.places,), EMPTY, dtype=torch.int64, device=self.device)
        self.device_base = torch.zeros((), dtype=torch.int64, device=self.device)
        self.count = self.base = 0

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.numel() * part.element_size() for part in (self.keys, self.rotated, self.values))

    def check(self, model: Network, batch: int) -> None:
        """Raise unless the cache is one of this model, as it is now, and of this batch size."""
        weight = model.key_weight
        if model is not self.model or weight.dtype != self.dtype or weight.device != self.device:
            raise DiffAccelError(
                f"The cache was made for another model, or the model was on {self.device} in {self.dtype} and is on "
                f"{weight.device} in {weight.dtype}. Call reset() again."
            )
        if batch != self.batch:
            raise DiffAccelError(f"The cache holds {self.batch} videos, and got {batch}. Call reset() again.")

    def clear(self) -> None:
        """Forget all frames; addresses stay."""
        self.ids.fill_(EMPTY)
        self.device_base.zero_()
        self.count = self.base = 0

    def note(self, frames: int) -> None:
        """Count frames as written, and keep the angles of keys small."""
        self.count += frames
        if self.count - self.base >= 2 * REBASE:
            self.move_base(self.count - REBASE)

    def move_base(self, base: int) -> None:
        """Count the time of rotations from another frame on: all keys are rotated anew, in place."""
        self.base = base
        self.device_base.fill_(base)
        times = (self.ids - base).clamp(min=-REBASE)
        size = self.places * self.tokens
        for layer in range(len(self.keys)):
            self.rotated[layer, :, :, :size].copy_(self.model.rotate_keys(self.keys[layer], times))

    def rollback(self, count: int) -> None:
        """Take frames back until only the first ``count`` are written: a change of ids, keys and values stay.

        Raises:
            DiffAccelError: for frames that the window needs and that later ones have overwritten.
        """
        if not 0 <= count <= self.count:
            raise DiffAccelError(f"rollback to {count} frames: {self.count} are written. Give 0 to {self.count}.")
        oldest = max(0, self.count - self.places)
        if oldest > max(0, count - (self.window - 1)):
            raise DiffAccelError(
                f"rollback to {count} frames: the ring of {self.places} places holds frames {oldest} to "
                f"{self.count - 1}, and the window needs those from {max(0, count - self.window + 1)} on. Evicted "
                "frames cannot return."
            )
        self.ids.masked_fill_(self.ids >= count, EMPTY)
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that :meth:`load_state_dict` needs to go on exactly."""
        ring = self.places * self.tokens
        return {
            "format": _FORMAT, "keys": self.keys.clone(), "values": self.values[..., :ring, :].clone(),
            "rotated": self.rotated[..., :ring, :].clone(), "ids": self.ids.clone(), "count": self.count,
            "base": self.base, "window": self.window,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a copied state; addresses stay.

        Raises:
            DiffAccelError: for a state of another format, model, batch size or window.
        """
        if state.get("format") != _FORMAT:
            raise DiffAccelError(f"The state has the format {state.get('format')!r}; this version reads {_FORMAT}.")
        same = state["keys"].shape == self.keys.shape and state["keys"].dtype == self.dtype
        if not same or state["window"] != self.window:
            raise DiffAccelError(
                f"The state is of keys {tuple(state['keys'].shape)} in {state['keys'].dtype} with the window "
                f"{state['window']}, and this cache of {tuple(self.keys.shape)} in {self.dtype} with {self.window}."
            )
        ring = self.places * self.tokens
        self.keys.copy_(state["keys"])
        self.values[..., :ring, :].copy_(state["values"])
        self.rotated[..., :ring, :].copy_(state["rotated"])
        self.ids.copy_(state["ids"])
        self.count, self.base = state["count"], state["base"]
        self.device_base.fill_(self.base)

    def clone(self) -> FrameCache[Network]:
        """Return a copy in memory of its own."""
        other = FrameCache(self.model, self.batch, self.window, self.places - self.window + 1, self.drafts)
        other.load_state_dict(self.state_dict())
        return other

"""What a network is told beside latents and time: the arguments of one prompt batch, by guidance branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Conditioning:
    """The network's arguments for one prompt batch, one row per sample, and the guidance that joins its branches.

    ``negative`` is None where the call is not guided by a second branch. ``joint`` keeps the pipeline's own batched
    arguments (negative rows first) for families that evaluate both branches in one call.
    """

    positive: dict[str, Any]
    negative: dict[str, Any] | None
    joint: dict[str, Any] | None
    arguments: dict[str, Any]

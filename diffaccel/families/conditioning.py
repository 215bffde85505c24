"""The network's arguments beside latents and time, for one prompt batch, by guidance branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Conditioning:
    """The network's arguments for one prompt batch, one row per sample.

    Attributes:
        positive: arguments of the positive branch.
        negative: arguments of the negative branch; None where the call is not guided by a second branch.
        joint: the pipeline's own arguments of both branches, for families that evaluate them in one call, else None.
        arguments: of the pipeline's call, which guidance depends on.
    """

    positive: dict[str, Any]
    negative: dict[str, Any] | None
    joint: dict[str, Any] | None
    arguments: dict[str, Any]

"""The limits of a group of 4-bit codes."""

from __future__ import annotations

from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.quant.formats import LEAST_GROUP


def check_group_size(config: Any) -> None:
    """Raise unless a config's groups hold an even number of codes from 16 on."""
    size = config.group_size
    if size < LEAST_GROUP or size % 2:
        raise DiffAccelError(
            f"{type(config).__name__}.group_size is {size}; it must be even and {LEAST_GROUP} or more, such as 128."
        )

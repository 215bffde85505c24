"""What is done to a network: stand-ins, step caches, fused blocks, and capture.

Methods that act on a network as a whole are imported from here: ``from diffaccel.modules import Capture``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffaccel.lazy import lazily

if TYPE_CHECKING:
    from diffaccel.modules.capture.config import Capture
    from diffaccel.modules.fused.config import FusedBlocks

__all__ = ["Capture", "FusedBlocks"]

_LAZY = {"Capture": "diffaccel.modules.capture.config", "FusedBlocks": "diffaccel.modules.fused.config"}


__getattr__ = lazily(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted(__all__)

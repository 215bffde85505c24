"""What is done to a network: stand-ins, step caches, fused blocks, and capture.

Methods that act on a network as a whole are imported from here: ``from diffaccel.modules import Capture``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.modules.capture.config import Capture
    from diffaccel.modules.fused.config import FusedBlocks

__all__ = ["Capture", "FusedBlocks"]

_LAZY = {"Capture": "diffaccel.modules.capture.config", "FusedBlocks": "diffaccel.modules.fused.config"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffaccel.modules' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

"""The evaluation: what an acceleration costs, and what it buys.

``compare(baseline, candidate)`` draws the same prompts and seeds in two or more ways and measures them side by side;
``diffaccel eval`` does the same in steps, from a shell. The metrics stand alone, in modules of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if "." not in __name__:
    raise ImportError("'eval' is a folder of diffaccel: import diffaccel.eval instead")

from diffaccel.lazy import lazily

if TYPE_CHECKING:
    from diffaccel.eval.api import compare

__all__ = ["compare"]


__getattr__ = lazily(__name__, {"compare": "diffaccel.eval.api"})  # which loads torch


def __dir__() -> list[str]:
    return sorted(__all__)

"""Linears that multiply 8-bit codes, and the codes that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffaccel.kernels.codes import Codes
from diffaccel.modules.fused.plain_parts import is_plain

Coded = tuple[Tensor, Tensor]


def codes_of(linears: Sequence[nn.Module]) -> Codes | None:
    """Return the kind of codes that all of these layers take as input; None where one of them takes numbers.

    A layer under an adapter or a hook takes numbers: what is around it must see them.
    """
    kinds = {getattr(linear, "input_codes", None) for linear in linears}
    kind = kinds.pop()
    return kind if not kinds and kind is not None and all(map(is_plain, linears)) else None


def product(linear: Any, coded: Coded, like: Tensor) -> Tensor:
    """Return the layer's product of rows of codes, ``(B, T, N)`` for codes of the rows of ``like (B, T, K)``."""
    result: Tensor = linear.product_of_codes(*coded, like.dtype)
    return result.view(*like.shape[:2], result.shape[1])

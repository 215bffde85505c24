"""The constant first row of text states: where it lies in a batch, found once for each encoding of prompts.

Causal text encoders give their first token the same state for every prompt, often far larger than all others, so that
one scale for all tokens would lose the others (arXiv 2405.17873). Its outputs are stored, and other rows are scaled by
themselves.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
_TOLERANCE = 1e-3  # of the largest magnitude of the row


@dataclass
class RowKinds:
    """Which rows of text states ``(B, T, K)`` are special.

    Attributes:
        constant: bool ``(B, T, 1)``: equal to the stored row, wherever it lies; longer prompts repeat it.
        zero: bool ``(B, T, 1)``: all zeros, as pipelines make of empty prompts.
        other: bool ``(B, 1)``: the first row is neither, by another encoder, an adapter on it, or a weighted prompt.
    """

    constant: Tensor
    zero: Tensor
    other: Tensor


def row_kinds(states: Tensor, row: Tensor) -> RowKinds:
    """Compare every row of text states with the stored one, without waiting for the device."""
    tolerance = max(_TOLERANCE, torch.finfo(states.dtype).eps / 2) * row.abs().amax()
    constant = (states.float() - row).abs().amax(dim=-1, keepdim=True) <= tolerance
    zero = (states == 0).all(dim=-1, keepdim=True)
    constant = constant & ~zero
    return RowKinds(constant, zero, ~(constant | zero)[:, 0])


@dataclass
class RowMemo:
    """The kinds of the rows of the latest text states, shared by all layers of a network that read them.

    Copies and pickles begin anew. Several threads may call one network: the kinds lie beside what they are of.
    """

    _latest: Any = field(default=None, repr=False)  # kinds, weak reference to the states, their version
    _told: bool = False

    def __call__(self, states: Tensor, row: Tensor) -> RowKinds:
        """Return the kinds of rows; the same tensor, unchanged, is looked at once.

        A graph that is recorded or compiled compares anew at each call, since its input is filled again in place.
        """
        if torch.compiler.is_compiling() or (states.is_cuda and torch.cuda.is_current_stream_capturing()):
            return row_kinds(states, row)
        if states.is_inference():  # whose changes in place are not counted
            return row_kinds(states, row)
        kinds, source, version = self._latest or (None, lambda: None, 0)
        if kinds is None or source() is not states or version != states._version:
            kinds = row_kinds(states, row)
            self._latest = (kinds, weakref.ref(states), states._version)
            self._tell(kinds)
        return kinds

    def _tell(self, kinds: RowKinds) -> None:
        if not self._told and bool(kinds.other.any()):
            self._told = True
            logger.warning(
                "The first text token is not the one that was calibrated: by another text encoder, an adapter on it, "
                "or a weighted prompt. It is quantized by its own scale. Calibrate with the encoder that is used."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> RowMemo:
        memo[id(self)] = copied = RowMemo()
        return copied


def share_rows(network: nn.Module) -> None:
    """Give all layers of a network that store the output of a constant row one memo."""
    memo = RowMemo()
    for module in network.modules():
        if hasattr(module, "row_memo"):
            vars(module)["row_memo"] = memo

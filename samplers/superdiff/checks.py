"""Checks of numbers that a config and an opened call share."""

from __future__ import annotations

from collections.abc import Sequence

from diffaccel.errors import DiffAccelError


def check_prior(weights: Sequence[float]) -> None:
    """Raise for prior weights that are negative or do not sum to 1."""
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise DiffAccelError(
            f"SuperDiff.weights is {tuple(weights)}, which sum to {sum(weights):g}; weights of 'or' and 'average' must "
            "be 0 or more and sum to 1."
        )

"""Every two methods compose, shown by a run, or refuse each other by name."""

from __future__ import annotations

from typing import Any

import method_pairs
import pytest


def pair(first: str, second: str) -> Any:
    """Return the parameters of a pair: those that meet in the list of methods are shown at once, the others slowly."""
    apart = method_pairs.METHODS.index(second) - method_pairs.METHODS.index(first)
    return pytest.param(first, second, marks=[pytest.mark.slow] * (apart > 1))


@pytest.mark.parametrize(("first", "second"), [pair(*names) for names in method_pairs.PAIRS])
def test_pair(first: str, second: str) -> None:
    found = method_pairs.outcome(first, second)
    if found["cell"] == "-":
        pytest.skip(found["why"])
    assert found["cell"] in ("yes", "refused"), found["why"]
    if {first, second} <= method_pairs.EXAMPLES.keys():
        expected = "yes" if method_pairs.composes(first, second) else "refused"
        assert found["cell"] == expected, found["why"]

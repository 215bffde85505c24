"""Every two methods compose, shown by a run, or refuse each other by name."""

from __future__ import annotations

import method_pairs
import pytest


@pytest.mark.parametrize(("first", "second"), method_pairs.PAIRS)
def test_pair(first: str, second: str) -> None:
    found = method_pairs.outcome(first, second)
    if found["cell"] == "-":
        pytest.skip(found["why"])
    assert found["cell"] in ("yes", "refused"), found["why"]
    if {first, second} <= method_pairs.EXAMPLES.keys():
        expected = "yes" if method_pairs.composes(first, second) else "refused"
        assert found["cell"] == expected, found["why"]

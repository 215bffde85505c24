"""Files of timings: what was damaged, or is something else, is named."""

from __future__ import annotations

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.timing.turns import check_timing

ENTRY = {
    "name": "plain", "folder": "plain", "turns": 2, "seconds": [1.0, 2.0], "seconds_per_image": 1.5,
    "first_call_seconds": 3, "parts": {}, "steps": [0.1],
}  # fmt: skip
TIMING = {"images_a_call": 1, "turns": 2, "device": {"type": "cpu"}, "variants": [ENTRY, ENTRY]}


def test_a_whole_timing_is_returned():
    assert check_timing(TIMING, "t.json") == TIMING


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ([], "all of it"),
        ({"variants": None}, "variants"),
        ({"variants": [ENTRY, {**ENTRY, "seconds": [1.0, None]}]}, r"variants\[1\]\.seconds\[1\]"),
        ({"variants": [{key: ENTRY[key] for key in ENTRY if key != "parts"}]}, r"variants\[0\]\.parts"),
        ({"turns": True}, "turns"),
    ],
)
def test_a_damaged_one_is_one_sentence(damage, part):
    with pytest.raises(DiffAccelError, match=rf"'t\.json' is no timing .*: {part} is missing or no such value"):
        check_timing({**TIMING, **damage} if isinstance(damage, dict) else damage, "t.json")


def test_one_of_a_later_version_is_refused():
    assert check_timing({**TIMING, "format": 1}, "t.json")
    with pytest.raises(DiffAccelError, match=r"The timing 't\.json' has format 2, and this diffaccel reads up to 1"):
        check_timing({**TIMING, "format": 2}, "t.json")

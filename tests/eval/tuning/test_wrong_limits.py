"""Limits of a tuning that cannot be are refused before its folder keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.tuning import tune


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"budget": -1.0}, "budget is -1 seconds; it must be a finite number above 0"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"budget": "10"}, "budget is '10'; it must be a finite number above 0"),
        ({"fail_if": ""}, "wants a metric at character 1"),
        ({"fail_if": "ssim<1.1"}, "fails also pictures that equal the baseline's"),
        ({"fail_if": "speedup<2 or psnr>30"}, "fails also pictures that equal the baseline's"),
        ({"fail_if": "ssim<0.9 and ssim>0.95"}, "which no number is"),
    ],
)
def test_nothing_is_left_in_the_folder(limits: dict[str, Any], why: str, tmp_path: Path) -> None:
    """Else the mended command would be refused as another tuning than the folder's."""
    with pytest.raises(DiffAccelError, match=why):
        tune("emoji-flux", out=tmp_path / "tune", **limits)
    assert not (tmp_path / "tune").exists()

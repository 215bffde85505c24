"""The verdict "same" by simulation: half of what other seeds do is hardly ever called so, and no change is in time."""

from __future__ import annotations

import numpy as np
import pytest

from scripts import coverage_of_verdicts


def shares(n: int, share: float, repeats: int, population: str = "normal") -> tuple[float, float]:
    draw = np.random.default_rng(0)
    values = draw.normal(size=20_000) if population == "normal" else draw.standard_t(3, size=20_000)
    return coverage_of_verdicts.shares_called_same(values, n, share, repeats, draw)


def test_ten_prompts_do_not_make_half_of_what_seeds_do_the_same() -> None:
    assert shares(10, 0.3, 20)[0] <= 0.05  # a third of them, were the margin what seeds do to ten prompts
    assert shares(10, 0.02, 20) == (0.0, 1.0)  # a change without noise is known from few


@pytest.mark.slow
@pytest.mark.parametrize("population", ["normal", "heavy-tailed"])
@pytest.mark.parametrize("n", [10, 30, 100])
def test_half_of_what_seeds_do_is_not_called_the_same(n, population) -> None:
    assert max(shares(n, share, 40, population)[0] for share in (0.05, 0.3)) <= 0.05


@pytest.mark.slow
def test_no_change_is_called_the_same_from_enough_prompts_on() -> None:
    assert shares(300, 0.3, 30)[1] >= 0.8

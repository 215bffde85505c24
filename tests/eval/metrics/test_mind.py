"""MIND: closed forms of the sliced distance, unequal sizes, seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.mind import mind, mind_difference, mind_interval


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_shift() -> None:
    """Every direction sees ``(u.s)^2``, whose mean over directions is ``|s|^2 / d``."""
    x, shift = draw(40, 12), draw(1, 12, seed=1)[0]
    assert mind(x, x + shift, projections=20_000) == pytest.approx(3 * float(shift @ shift), rel=0.05)
    assert mind(draw(9, 1), draw(9, 1) + 2) == pytest.approx(12, rel=1e-12)  # one dimension has one direction


def test_a_scale() -> None:
    """Sorted values scale in place: ``(c - 1)^2`` times the second moment, on average ``3 (c - 1)^2 E|x|^2``."""
    x = draw(60, 10)
    expected = 3 * 0.5**2 * float(x.square().sum(1).mean())
    assert mind(x, 1.5 * x, projections=20_000) == pytest.approx(expected, rel=0.05)


def test_a_set_and_itself_in_any_order() -> None:
    x = draw(50, 8)
    assert mind(x, x.flip(0)) == pytest.approx(0, abs=1e-25)
    assert mind(x, draw(31, 8, seed=1)) == pytest.approx(mind(x.flip(0), draw(31, 8, seed=1).roll(7, 0)), rel=1e-12)


def test_unequal_sizes_are_exact() -> None:
    """Repeating rows changes no distribution, so 6 and 4 rows compare as 12 and 12."""
    x, y = draw(6, 5), draw(4, 5, seed=1) + 1
    assert mind(x, y) == pytest.approx(mind(x.repeat(2, 1), y.repeat(3, 1)), rel=1e-12)
    # by hand, in one dimension: {0, 3} against {0, 1, 2} costs (0 + 1/6 * 1 + 1/6 * 4 + 1/3 * 1)
    value = mind(torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]]), projections=1)
    assert value == pytest.approx(3 * (1 / 6 * 1 + 1 / 6 * 4 + 1 / 3 * 1), rel=1e-12)


def test_equal_sizes_are_the_paper_s_sum() -> None:
    x, y = draw(30, 6), draw(30, 6, seed=1) * 1.2
    u = torch.randn(100, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u /= u.norm(dim=1, keepdim=True)
    gaps = (x @ u.T).sort(0).values - (y @ u.T).sort(0).values
    assert mind(x, y, projections=100, seed=4) == pytest.approx(float(18 * gaps.square().mean()), rel=1e-12)
    assert mind(x, y, projections=100, seed=5) != mind(x, y, projections=100, seed=4)


@pytest.mark.slow
def test_it_sees_what_two_moments_do_not() -> None:
    """Signs against Gaussians: equal means and covariances, and projections along an axis differ."""
    x, y = draw(4000, 2), draw(4000, 2, seed=1).sign()
    assert mind(x, y) > 20 * mind(x, draw(4000, 2, seed=2))


def test_refused() -> None:
    with pytest.raises(DiffAccelError, match="at least one direction"):
        mind(draw(5, 2), draw(5, 2), projections=0)
    with pytest.raises(DiffAccelError, match="x has 2 features and y has 3"):
        mind(draw(5, 2), draw(5, 3))


def test_the_interval_of_one_dimension_is_that_of_its_closed_form() -> None:
    """Against a set far away, MIND is ``3 (m - c)^2`` plus what is alike: its influences are ``6 (m - c) x``."""
    x, y = draw(200, 1), torch.full((50, 1), 1000.0)
    found = mind_interval(x, y, projections=1)
    assert found.value == pytest.approx(mind(x, y), rel=1e-12)
    half = 1.972 * 6 * 1000 * float(x.std()) / 200**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_intervals_of_pairs_and_differences() -> None:
    x, y = draw(80, 6), draw(120, 6, seed=1) + 0.3
    near = x + 0.1 * draw(80, 6, seed=2)
    own, fixed = (mind_interval(x, near, projections=50, pairs=p) for p in ([(i, i) for i in range(80)], ()))
    assert own.high - own.low < fixed.high - fixed.low and "both sides paired" in own.method
    less = mind_difference(x, near, y, projections=50)
    assert less.value == pytest.approx(mind(x, y, projections=50) - mind(near, y, projections=50))
    assert less.low < less.value < less.high and less.null == 0
    assert mind_difference(x, x, y, projections=50).high == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_interval_needs_rows_with_a_spread_in_both_halves(n: int) -> None:
    for call in (lambda: mind_interval(draw(n, 2), draw(9, 2)), lambda: mind_difference(*[draw(n, 2)] * 2, draw(9, 2))):
        with pytest.raises(DiffAccelError, match=f"{n} rows of 2 features are too few; at least 4 rows are needed"):
            call()

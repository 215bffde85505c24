"""The Inception Score at its ends, by its definition, and as torch-fidelity computes it."""

from __future__ import annotations

import math

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.inception_score import inception_score


def logits(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def test_equal_predictions_score_one() -> None:
    mean, std = inception_score(logits(1, 20).expand(50, 20), splits=5)
    assert (mean, std) == (pytest.approx(1, rel=1e-12), pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("sharpness", [200.0, 1e30])
def test_certain_and_balanced_predictions_score_the_number_of_classes(sharpness: float) -> None:
    one_hot = sharpness * torch.eye(7).repeat(10, 1)  # contiguous splits hold each class equally often
    mean, std = inception_score(one_hot, splits=10, shuffle_seed=None)
    assert (mean, std) == (pytest.approx(7, rel=1e-12), pytest.approx(0, abs=1e-11))


def test_by_its_definition() -> None:
    x = logits(23, 6)
    scores = []
    for i in range(4):
        p = x[i * 23 // 4 : (i + 1) * 23 // 4].double().softmax(1)
        scores.append(math.exp(float((p * (p.log() - p.mean(0).log())).sum(1).mean())))
    mean, std = inception_score(x, splits=4, shuffle_seed=None)
    average = sum(scores) / 4
    assert mean == pytest.approx(average, rel=1e-12)
    assert std == pytest.approx((sum((s - average) ** 2 for s in scores) / 4) ** 0.5, rel=1e-10)


@pytest.mark.parametrize("seed", [2020, None])
def test_parity_with_torch_fidelity(seed: int | None) -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    x = logits(1003, 50)
    expected = theirs.isc_features_to_metric(x, splits=10, shuffle=seed is not None, rng_seed=2020)
    mean, std = inception_score(x, shuffle_seed=seed)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-8)


def test_splits_of_a_size_are_contiguous_and_the_last_may_be_smaller() -> None:
    x = logits(23, 6)
    parts = [inception_score(x[i : i + 10], splits=1, shuffle_seed=None)[0] for i in (0, 10, 20)]
    mean, std = inception_score(x, size=10, shuffle_seed=None)
    assert mean == pytest.approx(sum(parts) / 3, rel=1e-12) and std > 0
    assert inception_score(x, size=99, shuffle_seed=None) == inception_score(x, splits=1, shuffle_seed=None)


def test_half_precision_is_widened_before_the_softmax() -> None:
    x = logits(200, 30).half()
    assert inception_score(x) == inception_score(x.double())


def test_refused() -> None:
    for splits in (0, 6):
        with pytest.raises(DiffAccelError, match="5 images cannot be cut into"):
            inception_score(logits(5, 3), splits=splits)
    with pytest.raises(DiffAccelError, match="got size 0"):
        inception_score(logits(5, 3), size=0)
    with pytest.raises(DiffAccelError, match="logits: 1 of 5 rows hold NaN or infinity, the first is row 2"):
        inception_score(logits(5, 3).index_fill(0, torch.tensor(2), torch.inf), splits=1)

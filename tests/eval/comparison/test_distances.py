"""Rows of distributions: each number is that of its function, with the interval and the words that belong to it."""

from __future__ import annotations

import pytest
import torch

from diffaccel.eval.comparison import compare_runs, distances, distribution, nearest, printed_distances
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics import frechet_intervals, mind, mmd, mmd_intervals
from diffaccel.eval.networks.extractors import as_clip, extractor
from tests.support import made_runs

COUNT = 110


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    images = {
        "base": [made_runs.blocks(i) for i in range(COUNT)],
        "darker": [made_runs.blocks(i) // 2 for i in range(COUNT)],
        "reference": [made_runs.blocks(7000 + i) for i in range(COUNT - 1)] + [made_runs.blocks(3)],
    }
    return {name: made_runs.of_images(root / name, some, ["a"] * COUNT) for name, some in images.items()}


@pytest.fixture(scope="module")
def judge():
    return as_clip(extractor("emoji-clip-judge"))


@pytest.mark.slow
def test_a_clip_gives_cmmd_and_says_that_it_is_not_the_papers(sets, judge):
    found = compare_runs(sets["base"], [sets["darker"]], Measures(extractors=[judge]))
    row = found.row("cmmd", "darker")
    x, y = (distribution.features(sets[name], judge) for name in ("darker", "base"))
    assert row.value == pytest.approx(mmd.cmmd(x, y), rel=1e-12)
    pairs = [(i, i) for i in range(COUNT)]
    assert row.detail["unbiased"] == pytest.approx(mmd.cmmd_unbiased(x, y, pairs=pairs), rel=1e-12)
    assert row.key == "CMMD[emoji-clip-judge] x1000" and "not the published ViT-L-14-336" in row.detail["from"]
    assert found.row("fd_infinity", "darker") is None  # of pictures of equal seeds it would say nothing


@pytest.mark.slow
def test_against_a_reference(sets):
    tiny = extractor("tiny")
    reference = open_source(sets["reference"].path)
    found = compare_runs(sets["base"], [sets["darker"]], Measures(extractors=[tiny], reference=reference))
    of = {name: distribution.features(run, tiny) for name, run in sets.items()}
    row = found.row("mind", "darker")
    expected = [mind.mind(of[name], of["reference"]) for name in ("darker", "base")]
    assert row.value == pytest.approx(expected[0]) and row.delta == pytest.approx(expected[0] - expected[1])
    kid = found.row("kid", "darker")
    interval = mmd_intervals.kid_difference(of["darker"], of["base"], of["reference"])
    assert kid.interval.low < kid.value < kid.interval.high
    assert kid.delta_interval.low == pytest.approx(1000 * interval.low)
    assert found.row("cmmd", "darker") is None  # no CLIP
    assert all(found.row(name, "darker") for name in ("precision", "recall", "density", "coverage"))
    near = next(section for section in found.sections if section.key.startswith("nearest"))
    mine, theirs, cosine = near.data["runs"]["base"]["nearest"][0]
    assert (mine, theirs, round(cosine, 9)) == ("00003", "00109", 1.0)  # the picture that was planted


@pytest.mark.slow
def test_infinity_is_measured_of_many_independent_pictures():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 8, generator=draw) for n in (600, 2000))
    tiny = extractor("tiny")

    def measured(count, independent):
        functions = distances.distance_functions(tiny, count, independent=independent)
        return {metric: number for function in functions for metric, number in function(x, y).items()}

    number = measured(600, True)["fd_infinity"]
    expected = frechet_intervals.infinity(x, y)
    assert (number.value, number.interval) == (expected.value, expected.interval)
    assert f"R² {expected.r2:.3f}" in number.note and number.detail["sizes"] == expected.sizes
    assert number.detail["warning"] == expected.warning
    assert "fd_infinity" not in measured(600, False) and "fd_infinity" not in measured(499, True)
    assert set(measured(499, True)) < set(printed_distances.MEASURES)


def test_nearest_is_the_largest_cosine_and_its_place():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(5000, 6, generator=draw), torch.randn(70, 6, generator=draw)
    cosines, places = nearest.nearest_cosines(x, y)
    mean = y.double().mean(0)
    everything = torch.cosine_similarity(x[:, None] - mean, y[None] - mean, dim=2)
    shifted = nearest.nearest_cosines(x + 100, y + 100)
    assert torch.allclose(shifted[0], cosines, atol=1e-4)  # what all share does not count
    assert torch.allclose(cosines, everything.max(1).values) and places.equal(everything.argmax(1))
    assert nearest.nearest_cosines(y, y)[1].tolist() == list(range(70))

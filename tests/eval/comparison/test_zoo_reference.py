"""Runs of a zoo model are compared with the statistics that ship for it, in the features they were made in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffaccel import zoo
from diffaccel.eval.comparison import compare_runs, distribution, zoo_reference
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.metrics import frechet, frechet_intervals
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors.base import Extractor
from tests.support import made_runs

COUNT, SIDE = 100, 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root, texts = tmp_path_factory.mktemp("zoo"), [f"thing {i}" for i in range(COUNT)]
    images = [made_runs.blocks(i, SIDE) for i in range(COUNT)]
    made = {"settings": {"model": "emoji-flux"}}
    base = made_runs.of_images(root / "base", images, texts, made)
    return base, made_runs.of_images(root / "dark", [image // 2 for image in images], texts, made)


def projected(clip_name, label, device):
    """A cheap network of as many features as the CLIP has."""
    matrix = torch.randn(3 * 8 * 8, 192, generator=torch.Generator().manual_seed(0)) / 8
    network = lambda images: F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1) @ matrix  # noqa: E731
    return Extractor(name="p", key="FD-p", dim=192, weights_sha256="", official=False, network=network)


@pytest.mark.slow
def test_the_shipped_statistics_are_the_default_reference(runs, monkeypatch):
    monkeypatch.setattr(zoo_reference, "_as_statistics_were_made", projected)
    base, dark = runs
    result = compare_runs(base, [dark], Measures.load(extractors=None, baseline=base, device="cpu"))
    row = result.row("fd", "dark")
    assert row.key == "FD-p" and result.gate_values("dark")["fd"] == row.delta
    stored = np.load(zoo.path("emoji-clip-judge") / f"fd_reference_{SIDE}.npz")
    mean, covariance = (torch.from_numpy(stored[name]) for name in ("mu", "sigma"))
    moments = Moments.from_covariance(mean, covariance, int(stored["n"]))
    x, y = (distribution.features(run, projected("", "", "")) for run in (dark, base))
    assert row.value == pytest.approx(frechet.distance(Moments.of(x), moments), rel=1e-9)
    expected = frechet_intervals.difference(x, y, moments)
    assert (row.delta_interval.low, row.delta_interval.high) == pytest.approx((expected.low, expected.high))
    assert row.m == int(stored["n"])
    assert "training pictures of emoji-flux" in row.detail["from"] and "covariance is singular" in row.detail["from"]
    assert f"the {row.m} pictures that emoji-flux was trained on" in result.to_dict()["reference"]


def test_pictures_are_prepared_as_those_of_the_statistics_were(runs):
    """Enlarged bilinearly in [-1, 1], shrunk by area, and not normalised."""
    found = zoo_reference.find(runs[0])
    assert found.extractor.key == "FD-clip[emoji-clip-judge][icons]"
    for side, options in ((64, {"mode": "bilinear", "antialias": True}), (256, {"mode": "area"})):
        pixels = torch.stack([made_runs.blocks(i, side) for i in range(2)])
        resized = F.interpolate(pixels.float() / 127.5 - 1, 128, **options)
        with torch.no_grad():
            expected = found.extractor.module.encode_image(resized)
        assert torch.allclose(found.extractor(pixels), expected, atol=1e-4)


def test_it_can_be_switched_off_and_needs_a_run_that_it_fits(runs, tmp_path):
    base, _ = runs
    off = Measures.load(extractors=None, reference="none", baseline=base, device="cpu")
    assert off.reference is None and [network.name for network in off.extractors] == ["tiny"]
    named = Measures.load(extractors=["tiny"], baseline=base, device="cpu")
    assert named.reference is None and [network.name for network in named.extractors] == ["tiny"]
    small = made_runs.of_images(
        tmp_path / "small", [made_runs.blocks(i) for i in range(COUNT)], ["a"] * COUNT, base.record
    )
    few = type(base)("few", base.path, base.pictures[:99], base.record)
    other = type(base)("other", base.path, base.pictures, {"settings": {"model": "mine"}})
    plain = type(base)("plain", base.path, base.pictures)
    assert [zoo_reference.find(run) for run in (small, few, other, plain)] == [None] * 4

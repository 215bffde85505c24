"""The same random weights in our Inception and in the public packages: the same features.

The published weights are not needed for this. Images are few, because Inception on a CPU is slow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffaccel.eval.metrics import frechet
from diffaccel.eval.networks.extractors import extractor
from diffaccel.eval.networks.extractors.base import Extractor
from tests.support import random_inception


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return random_inception.save(tmp_path_factory.mktemp("inception") / "random.pth")


def ours(file: Path, **options: str) -> Extractor:
    return extractor(f"inception:{file}", allow_unknown_weights=True, **options)


def images(n: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Smooth with some noise: both tell resizings apart."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.rand(n, 3, height, width, generator=generator)
    return ((0.8 * smooth + 0.2 * noise) * 255).round().to(torch.uint8)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(64, 64), (299, 299), (320, 250)])
def test_torch_fidelitys_features_and_logits(file, size):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    taps = ["2048", "logits_unbiased", "logits"]
    network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", taps, feature_extractor_weights_path=str(file))
    x = images(2, *size)
    pool3, unbiased, logits = network(x)
    found = ours(file)
    features = found(x)
    assert apart(features, pool3) < 1e-5
    assert apart(found.logits(features, bias=False), unbiased) < 1e-5
    assert apart(found.logits(features, bias=True), logits) < 1e-5
    assert apart(unbiased, logits) > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (299, 299)])
def test_pytorch_fids_features(file, size, monkeypatch):
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda url, progress: torch.load(file, weights_only=True))
    network = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    x = images(2, *size)
    with torch.no_grad():
        expected = network(x.float() / 255)[0][..., 0, 0]
    assert apart(ours(file, protocol="pytorch-fid")(x), expected) < 1e-5
    assert apart(ours(file, protocol="tf-fid")(x), expected) > 1e-3  # another scale, and another resizing


def test_clean_fids_features(file):
    """Their resizing, then the network on (v - 128) / 128 without a resizing of its own."""
    theirs = pytest.importorskip("cleanfid.resize")
    x = images(2, 80, 100)
    resized = np.stack([theirs.build_resizer("clean")(image.permute(1, 2, 0).numpy()) for image in x])
    found = ours(file, protocol="clean-fid")
    with torch.no_grad():
        expected = found.inception.pool3((torch.from_numpy(resized).permute(0, 3, 1, 2) - 128) / 128)
    assert apart(found(x), expected) < 1e-5


@pytest.mark.slow
def test_a_row_depends_on_its_image_alone(file):
    x, network = images(4), ours(file)
    together = network(x)
    assert apart(torch.cat([network(x[:1]), network(x[1:])]), together) < 1e-5
    assert apart(network(x.flip(0)).flip(0), together) < 1e-5


@pytest.fixture(scope="module")
def distances(file) -> dict[str, float]:
    """Of torchmetrics, which resizes with and without antialiasing, and ours."""
    pytest.importorskip("torch_fidelity")
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = images(4, 400, 400, seed=1), images(4, 400, 400, seed=2)
    found = {}
    for antialias in (False, True):
        metric = fid.FrechetInceptionDistance(2048, feature_extractor_weights_path=str(file), antialias=antialias)
        metric.update(a, real=True)
        metric.update(b, real=False)
        found[f"antialias={antialias}"] = float(metric.compute())
    network = ours(file)
    return {**found, "ours": frechet.distance_of_features(network(a).double(), network(b).double())}


def test_torchmetrics_distance_without_antialiasing(distances):
    assert distances["ours"] == pytest.approx(distances["antialias=False"], rel=1e-4)


def test_torchmetrics_default_is_another_number(distances):
    assert abs(distances["antialias=True"] / distances["ours"] - 1) > 1e-3

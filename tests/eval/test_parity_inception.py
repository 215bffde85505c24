"""The Inception network of the FID against public ports of it, on random weights in one file."""

from __future__ import annotations

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.extractors import extractor
from diffaccel.eval.extractors.inception import InceptionNetwork


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = InceptionNetwork()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 64, 80), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_other_weights_are_refused_and_never_called_fid(weights):
    with pytest.raises(DiffAccelError, match="6726825d"):
        extractor(f"inception:{weights}")
    found = extractor(f"inception:{weights}", allow_unknown_weights=True)
    assert not found.official and found.key.startswith("FD-inception")


def test_features_are_torch_fidelitys(weights, images):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    ours = extractor(f"inception:{weights}", allow_unknown_weights=True)
    network = theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    with torch.no_grad():
        expected = network(images)[0]
    found = ours(images)
    assert found.shape == (3, 2048)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5

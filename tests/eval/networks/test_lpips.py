"""LPIPS against torchmetrics on random backbones, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import lpips, weights
from diffaccel.eval.networks.lpips import Lpips
from diffaccel.files import sha256

torchvision = pytest.importorskip("torchvision")
BUILD = {"alex": "alexnet", "vgg": "vgg16"}


def backbone(net: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return getattr(torchvision.models, BUILD[net])(weights=None).eval()


def pair(count: int = 2, size: tuple[int, int] = (64, 64)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    a = torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-60, 61, a.shape, generator=generator)
    return a, (a + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def alex() -> dict[str, Tensor]:
    return backbone("alex").state_dict()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(("net", "size"), [("alex", (64, 64)), ("alex", (31, 75)), ("vgg", (32, 48))])
def test_parity_with_torchmetrics(net: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    network = backbone(net)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda name, pretrained=False: network.features)
    a, b = pair(3, size)
    expected = theirs.learned_perceptual_image_patch_similarity(
        a.float() / 255, b.float() / 255, net_type=net, reduction="none", normalize=True
    )
    got = Lpips(network.state_dict(), net)(a, b)
    assert got.dtype == torch.float64 and got.shape == (3,)
    assert (expected > 1e-4).all()
    torch.testing.assert_close(got, expected.double(), rtol=1e-5, atol=1e-7)


def test_a_distance_is_zero_symmetric_and_independent_of_the_batch(alex: dict[str, Tensor]) -> None:
    measure = Lpips(alex, batch=2)
    a, b = pair(5)
    assert measure(a, a).tolist() == [0.0] * 5
    torch.testing.assert_close(measure(b, a), measure(a, b), rtol=1e-5, atol=0)
    torch.testing.assert_close(Lpips(alex, batch=5)(a, b), measure(a, b), rtol=1e-5, atol=0)


def test_only_the_convolutions_are_needed_and_the_weights_stay_as_they_are(alex: dict[str, Tensor]) -> None:
    before = {name: value.clone() for name, value in alex.items()}
    features = {name: value for name, value in alex.items() if name.startswith("features.")}
    a, b = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # an outer autocast must not lower the precision
        inside = Lpips(features)(a, b)
    assert torch.equal(inside, Lpips(alex)(a, b))
    assert all(torch.equal(alex[name], value) for name, value in before.items())


@pytest.mark.slow
def test_a_file_of_weights_is_found_and_named(
    alex: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair()
    file = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save(alex, file)
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    for path in (file, None):
        measure = lpips.load(path)
        assert measure.name == "lpips-alex" and measure.weights_sha256 == sha256(file)
        assert torch.equal(measure(a, b), Lpips(alex)(a, b))
    file.write_bytes(b"not weights")
    with pytest.raises(DiffAccelError, match=r"alexnet-owt-7be5be79.pth' cannot be read as plain weights"):
        lpips.load()
    file.unlink()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(
        weights.MissingWeights, match=r"'alexnet-owt-7be5be79.pth' were not found; looked for .*PSNR and SSIM"
    ):
        lpips.load()


def test_errors_say_what_is_wrong(alex: dict[str, Tensor]) -> None:
    a, b = pair()
    with pytest.raises(DiffAccelError, match=r"Unknown LPIPS network 'alexnet'. Did you mean 'alex'"):
        Lpips(alex, "alexnet")
    with pytest.raises(DiffAccelError, match=r"weights of the 'vgg' backbone: features.0 .*got \(64, 3, 11, 11\)"):
        Lpips(alex, "vgg")
    with pytest.raises(DiffAccelError, match=r"features.3 must be .* got nothing.*alexnet-owt"):
        Lpips({name: value for name, value in alex.items() if not name.startswith("features.3.")})
    with pytest.raises(DiffAccelError, match=r"features.8 .* not finite"):
        Lpips({**alex, "features.8.bias": torch.full((256,), float("nan"))})
    with pytest.raises(DiffAccelError, match="at least 31 pixels a side, got 64x30"):
        Lpips(alex)(a[:, :, :30], b[:, :, :30])
    with pytest.raises(DiffAccelError, match="uint8"):
        Lpips(alex)(a / 255, b / 255)


@pytest.mark.gpu
def test_a_gpu_agrees_without_tf32(alex: dict[str, Tensor]) -> None:
    a, b = pair()
    torch.testing.assert_close(Lpips(alex, device="cuda")(a, b), Lpips(alex)(a, b), rtol=1e-5, atol=1e-8)

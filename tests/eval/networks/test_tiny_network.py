"""The embedded feature network: its contract, its packaged weights, what they notice, and how they are made."""

from __future__ import annotations

import argparse
import hashlib
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks.tiny_network import FORMAT, WEIGHTS, TinyNetwork, load_tiny, weights_sha256
from scripts.features import check_tiny, degradations, pictures, train_tiny
from scripts.features.held_out import HELD_OUT
from scripts.features.textures import FAMILIES, sample


@pytest.fixture(scope="module")
def network():
    return load_tiny()


@pytest.fixture(scope="module")
def held_out():
    return pictures.held_out(240, seed=5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the network -------------------------------------------------------------------------------------------------------


def test_value_range_and_resize_are_as_documented(network):
    images = torch.randint(0, 256, (2, 3, 200, 96), dtype=torch.uint8, generator=seeded())
    x = F.interpolate(images.float(), (128, 128), mode="bilinear", antialias=True, align_corners=False) / 127.5 - 1
    expected = network.stages(x).mean((2, 3))
    assert torch.allclose(network(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (2, TinyNetwork.dim)
    assert network(images).dtype == torch.float32
    exact = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=seeded())
    assert torch.equal(network(exact), network.stages(exact.float() / 127.5 - 1).mean((2, 3)))


@pytest.mark.slow
def test_a_row_depends_on_its_picture_alone(network, held_out):
    images = held_out.images[:64]
    together = network(images)
    alone = torch.cat([network(image) for image in images.split(1)])
    order = torch.randperm(64, generator=seeded())
    assert (together - alone).abs().max() <= 5e-6
    assert (together[order] - network(images[order])).abs().max() <= 5e-6
    assert network(images[:0]).shape == (0, network.dim)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 8, 8), "uint8.*float32.*round"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"\(2, 8, 8, 3\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\(3, 8, 8\)"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), "8x0 pixels"),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(network, images, said):
    with pytest.raises(DiffAccelError, match=said):
        network(images)


# -- the weights -------------------------------------------------------------------------------------------------------


def test_packaged_weights_are_small_and_say_what_they_are(network):
    assert WEIGHTS.stat().st_size <= 2 * 2**20
    assert weights_sha256() == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    with safe_open(WEIGHTS, framework="pt") as file:
        told = file.metadata()
    assert told["format"] == FORMAT and told["licence"] == "Apache-2.0"
    assert {"recipe", "seed", "date", "steps", "device"} <= told.keys()
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.slow
def test_every_feature_is_alive_and_of_one_scale(network):
    images = pictures.to_uint8(sample(FAMILIES, count=320, generator=seeded(9)).images)
    deviation = torch.cat([network(part) for part in images.split(16)]).std(0)
    assert 0.3 < deviation.min() and deviation.max() < 3  # 1 over the pictures that the scale was measured on


def test_weights_that_cannot_be_read_are_told(tmp_path, network):
    with pytest.raises(DiffAccelError, match=r"gone\.safetensors.*reinstall"):
        load_tiny(tmp_path / "gone.safetensors")
    (tmp_path / "half").write_bytes(WEIGHTS.read_bytes()[:5000])
    with pytest.raises(DiffAccelError, match=r"half.*reinstall"):
        load_tiny(tmp_path / "half")
    save_file(network.state_dict(), tmp_path / "future", metadata={"format": "2"})
    with pytest.raises(DiffAccelError, match=r"format 2; .* reads format 1"):
        load_tiny(tmp_path / "future")
    save_file({"other": torch.zeros(1)}, tmp_path / "other", metadata={"format": FORMAT})
    with pytest.raises(DiffAccelError, match="does not hold"):
        load_tiny(tmp_path / "other")


@pytest.fixture(scope="module")
def features(network):
    """Features of a set, computed once: every degradation is compared with the same halves."""
    extract, known = check_tiny.extractor(network, "cpu"), {}

    def call(images):
        key = hashlib.sha256(images.contiguous().numpy().tobytes()).digest()
        if key not in known:
            known[key] = extract(images)
        return known[key]

    return call


SLOW_KINDS = ("noise", "blur", "jpeg", "desaturation", "patch shuffle")
KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW_KINDS)) for kind in check_tiny.LEVELS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_distance_grows_with_every_degradation(features, held_out, kind, monkeypatch):
    """Of desaturation, which is the least, twice as many pictures are needed."""
    monkeypatch.setattr(check_tiny, "LEVELS", {kind: check_tiny.LEVELS[kind]})
    images = held_out if kind == "desaturation" else pictures.held_out(120, seed=5)
    (row,) = check_tiny.measure(features, images, seed=0)["rows"]
    assert row["spearman"] >= 0.9, row  # so few a side: neighbouring levels may be within the noise
    assert row["distances"][-1] > 2 * row["noise floor"]


# -- how they are made -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("families", [FAMILIES, HELD_OUT], ids=["training", "held out"])
def test_pictures_repeat_by_seed_and_are_never_flat_as_a_family(families):
    one, again, other = (sample(families, count=4 * len(families), generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert one.images.shape == (4 * len(families), 3, 128, 128)
    assert one.images.min() >= 0 and one.images.max() <= 1  # not so for not-a-number
    assert one.family.bincount().tolist() == [4] * len(families)
    known = one.factors[~one.factors.isnan()]
    assert ((known >= 0) & (known <= 1.01)).all()
    for i in range(len(families)):
        assert one.images[one.family == i].std((2, 3)).amax() > 0.01


def test_no_family_is_both_learned_and_held_out():
    assert not set(FAMILIES) & set(HELD_OUT)


@pytest.mark.parametrize("quality", [80, 30, 10])
def test_drawn_jpeg_is_near_libjpeg(quality):
    x = sample(FAMILIES, count=16, generator=seeded(3)).images
    x = (x * 255).round() / 255
    ours = degradations.jpeg(x, torch.full((16,), float(quality))).clamp(0, 1)
    real = []
    for image in pictures.to_uint8(x):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        real.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255)
    libjpeg = torch.stack(real)
    assert (ours - libjpeg).abs().mean() < 0.35 * (x - libjpeg).abs().mean()


def test_blur_is_gaussian():
    x = torch.zeros(2, 3, 64, 64)
    x[:, :, 32, 32] = 1
    y = degradations.gaussian_blur(x, torch.tensor([1.5, 4.0]))
    r = torch.arange(64.0) - 32
    for image, sigma in zip(y, (1.5, 4.0), strict=True):
        assert image.sum().item() == pytest.approx(3, rel=1e-5)
        assert (image[0].sum(0) * r**2).sum().item() == pytest.approx(sigma**2, rel=1e-3)  # its variance
    assert torch.allclose(degradations.gaussian_blur(torch.full_like(x, 0.3), torch.tensor([1.5, 9.0])), 0.3 + 0 * x)


@pytest.mark.parametrize(("share", "moved"), [(1 / 16, 4), (0.5, 32), (1.0, 64)])
def test_shuffle_moves_its_share_of_patches_and_loses_none(share, moved):
    names = torch.arange(64.0).view(1, 1, 8, 8).expand(3, 3, -1, -1)
    x = names.repeat_interleave(4, 2).repeat_interleave(4, 3)
    y = degradations.shuffle_patches(x, torch.full((3,), share), 8, seeded())
    blocks = y[:, 0, ::4, ::4]
    assert torch.equal(y, blocks[:, None].expand(-1, 3, -1, -1).repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert torch.equal(blocks.flatten(1).sort(1).values, torch.arange(64.0).expand(3, -1))
    assert ((blocks != names[:, 0]).flatten(1).sum(1) == moved).all()


def test_full_desaturation_is_grey_of_the_same_luma():
    x = torch.rand(2, 3, 8, 8, generator=seeded())
    y = degradations.desaturate(x, torch.ones(2))
    assert torch.allclose(y, degradations.luma(x).expand_as(x), atol=1e-6)
    assert torch.allclose(degradations.luma(y), degradations.luma(x), atol=1e-6)


@torch.no_grad()
def test_folding_is_exact_and_scaling_multiplies_features():
    torch.manual_seed(0)
    learner = train_tiny.Learner()
    for module in learner.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                values.normal_(0, 0.3)
            for values in (module.running_var, module.weight):
                values.uniform_(0.5, 2)
    x = sample(HELD_OUT, count=10, generator=seeded()).images * 2 - 1
    trained = learner.network.eval().features(x)
    network = train_tiny.folded(learner)
    assert torch.allclose(network.features(x), trained, rtol=1e-4, atol=1e-5)
    scale = torch.rand(network.dim, generator=seeded()) + 0.2
    train_tiny.rescale(network, scale)
    assert torch.allclose(network.features(x), trained * scale, rtol=1e-4, atol=1e-5)
    assert trained.std() > 0.01


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    def options(name):
        return argparse.Namespace(out=tmp_path / name, device="cpu", batch=12, steps=4, minutes=None, lr=1e-3, seed=3)

    monkeypatch.setattr(train_tiny, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train_tiny, "equalise", lambda network, device, seed: None)  # thousands of pictures
    whole = train_tiny.train(options("whole")).state_dict()
    exported = load_tiny(tmp_path / "whole" / "tiny.safetensors").state_dict()
    assert all(torch.equal(exported[name], whole[name].half().float()) for name in whole)
    real = train_tiny.batch

    def killed(count, step, generator):
        if step == 2:
            raise KeyboardInterrupt
        return real(count, step, generator)

    monkeypatch.setattr(train_tiny, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tiny.train(options("killed"))
    monkeypatch.setattr(train_tiny, "batch", real)
    again = train_tiny.train(options("killed")).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    other = options("killed")
    other.seed = 4
    with pytest.raises(SystemExit, match=r"seed.*Choose another --out"):
        train_tiny.train(other)


def test_spearman_is_of_ranks():
    stats = pytest.importorskip("scipy.stats")
    values = [0.1, 5.0, 3.0, 8.0, 7.0, 100.0]
    assert check_tiny.spearman(values) == pytest.approx(stats.spearmanr(values, range(6)).statistic)
    assert check_tiny.spearman([1.0, 2.0, 30.0]) == 1

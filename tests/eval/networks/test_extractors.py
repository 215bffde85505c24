"""Extractors: names and keys that cannot mislead, preprocessing to the bit, exact float32, refusals."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import resize, tiny_network, weights
from diffaccel.eval.networks.extractors import extractor
from diffaccel.eval.networks.extractors.base import Extractor, exact_float32
from diffaccel.eval.networks.extractors.inception import InceptionNetwork
from diffaccel.eval.networks.extractors.user import rows
from diffaccel.files import sha256
from tests.support import random_inception


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.fixture(autouse=True)
def nowhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of this machine are seen."""
    empty = str(tmp_path_factory.mktemp("empty"))
    monkeypatch.setenv(weights.VARIABLE, empty)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: empty)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", empty)


# -- what all have in common -----------------------------------------------------------------------------------------


def plain(network: nn.Module | None = None, dim: int = 4) -> Extractor:
    network = network or (lambda x: x.float().mean((2, 3)) @ torch.ones(3, dim))
    return Extractor(name="plain", key="FD-plain", dim=dim, weights_sha256="0" * 64, official=False, network=network)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 4, 4), r"uint8 images; got torch.float32.*to_uint8"),
        (pixels(3, 4, 4), r"shape \(B, 3, H, W\)"),
        (pixels(2, 4, 4, 3), r"shape \(B, 3, H, W\)"),
        (pixels(2, 3, 0, 4), r"shape \(B, 3, H, W\)"),
    ],
)
def test_images_are_not_guessed(images, message):
    with pytest.raises(DiffAccelError, match=message):
        plain()(images)


def test_features_are_float32_whatever_the_network_returns():
    """Half precision would overflow in a covariance; the values come out as they are, in float32."""
    found = plain(lambda x: x.half().mean((2, 3)) * 200, dim=3)(pixels(2, 3, 4, 4))
    assert found.dtype == torch.float32 and torch.isfinite(found).all() and found.max() > 1000
    with pytest.raises(DiffAccelError, match=r"'plain' returned features of shape \(2, 3\) .* expected \(2, 4\)"):
        plain(lambda x: x.float().mean((2, 3)))(pixels(2, 3, 4, 4))


def test_float32_is_exact_inside_and_as_before_after():
    seen = {}

    def network(x: Tensor) -> Tensor:
        backends = torch.backends
        seen["precision"] = (
            backends.cudnn.conv.fp32_precision,
            backends.cuda.matmul.fp32_precision,
            backends.mkldnn.matmul.fp32_precision
        )  # fmt: skip
        return x.float().flatten(1)[:, :4] @ torch.eye(4)

    def state() -> tuple[object, ...]:
        backends = torch.backends
        return (
            backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
            backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision,
        )  # fmt: skip

    before = state()
    assert before[0] is True  # the trap: cuDNN's convolutions round to TF32 by default
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = plain(network)(pixels(2, 3, 4, 4))
    assert found.dtype == torch.float32 and torch.equal(found, pixels(2, 3, 4, 4).flatten(1)[:, :4].float())
    assert seen.pop("precision") == ("ieee",) * 3 and state() == before
    with pytest.raises(ZeroDivisionError), exact_float32(torch.device("cpu")):
        raise ZeroDivisionError
    assert state() == before
    torch.set_float32_matmul_precision("high")
    try:
        changed = state()
        plain(network)(pixels(2, 3, 4, 4))
        assert seen["precision"] == ("ieee",) * 3 and state() == changed
        assert changed[1] is True
    finally:
        torch.set_float32_matmul_precision("highest")


# -- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("incepton", {}, "Unknown extractor 'incepton'. Did you mean 'inception"),
        ("open_clip", {}, r"lacks its argument. Write open_clip:ARCHITECTURE:/path or open_clip:local-dir:/folder"),
        ("timm:resnet18", {}, r"lacks its name or path. Write timm:NAME:/path"),
        ("timm:resnot18:/x", {}, "Unknown timm network 'resnot18'. Did you mean 'resnet18'"),
        ("tiny", {"protocol": "tf-fid"}, "'tf-fid' is of inception and does not say what to do before 'tiny'"),
        ("clean-inception", {"protocol": "adm"}, "does not say what to do before 'clean-inception'"),
        ("tiny", {"tap": "logits"}, "Only Inception has taps"),
        ("inception:/x", {"tap": "pool4"}, "Unknown tap of Inception 'pool4'. Did you mean 'pool3'"),
        ("inception", {"protocol": "tf_fid"}, "Did you mean 'tf-fid'"),
        ("py:json:nothing", {}, "no callable 'json:nothing'"),
        ("py:no_such_module:f", {}, "no callable 'no_such_module:f'"),
        ("py:json:__name__", {}, "'json:__name__' is not callable"),
    ],
)
def test_a_wrong_spec_says_what_is_right(spec, options, message):
    with pytest.raises(DiffAccelError, match=message):
        extractor(spec, **options)


@pytest.mark.parametrize(
    "spec", ["inception", "inception:/no/file.pth", "clean-inception", "dinov2", "torchscript:/no.pt",
                                  "timm:resnet18:/no.pth", "open_clip:ViT-B-32-quickgelu:/no.pt",
                                  "open_clip:ViT-B-32:openai"])  # fmt: skip
def test_missing_weights_name_the_file_and_the_way_out(spec):
    with pytest.raises(weights.MissingWeights, match=r"were not found; looked for .*--extractor tiny"):
        extractor(spec)


def test_tiny_says_that_it_is_tiny():
    found = extractor("tiny")
    sha = tiny_network.weights_sha256()
    assert (found.key, found.official, found.weights_sha256) == (f"FD-tiny@{sha[:8]}", False, sha)
    images = pixels(3, 3, 40, 56)
    features = found(images)
    assert features.shape == (3, found.dim)
    assert torch.allclose(found(images[1:2])[0], features[1], atol=1e-5)


# -- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    return random_inception.save(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.mark.slow
def test_only_verified_weights_are_called_fid(inception_file, monkeypatch):
    sha = sha256(inception_file)
    with pytest.raises(DiffAccelError, match=rf"sha256 {sha}, and the published .* 6726825d.*--allow-unknown-weights"):
        extractor(f"inception:{inception_file}")
    for spec, options, suffix in (
        ("inception", {}, "[tf-fid]"),
        ("inception", {"protocol": "pytorch-fid"}, "[pytorch-fid]"),
        ("clean-inception", {}, "[clean-fid]"),
        ("inception", {"tap": "spatial", "protocol": "adm"}, "[adm]"),
    ):
        found = extractor(f"{spec}:{inception_file}", allow_unknown_weights=True, **options)
        assert not found.official and "FID" not in found.key and found.key.endswith(suffix)
        assert f"(sha={sha[:8]})" in found.key and found.weights_sha256 == sha
    monkeypatch.setitem(weights.KNOWN, "inception", weights.WeightFile(files=("i.pth",), url="", sha256=sha[:8]))
    keys = {tap: extractor(f"inception:{inception_file}", tap=tap).key for tap in ("pool3", "spatial")}
    assert keys == {"pool3": "FID[tf-fid]", "spatial": "sFID-unverified[tf-fid]"}
    assert extractor(f"inception:{inception_file}").official


@pytest.mark.slow
def test_the_network_is_the_published_one(inception_file, tmp_path):
    network = InceptionNetwork()
    state = network.state_dict()
    assert len(state) == 566 and sum(value.numel() for value in state.values()) == 23_885_486
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(DiffAccelError, match="not a state dict of the Inception network of 2015"):
        extractor(f"inception:{tmp_path / 'other.pth'}", allow_unknown_weights=True)


def test_pooling_leaves_the_padding_out(inception_file):
    """Constant input: an average over valid pixels is the constant at the border too; the last block takes maxima."""
    network = InceptionNetwork()
    flat = torch.full((1, 2048, 8, 8), 3.0)
    seen = []
    for block, channels in (
        (network.Mixed_5b, 192), (network.Mixed_6b, 768), (network.Mixed_7b, 1280), (network.Mixed_7c, 2048)
    ):  # fmt: skip
        hook = block.branch_pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        block.eval()(flat[:, :channels])
        hook.remove()
    assert all(torch.equal(pooled, flat[:, : pooled.shape[1]]) for pooled in seen) and len(seen) == 4
    ramp = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 2048, 8, 8).contiguous()
    pooled = []
    network.Mixed_7c.branch_pool.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    network.Mixed_7c(ramp)
    assert pooled[0][0, 0, 3, 3] == ramp[0, 0, 4, 4]


@pytest.mark.slow
def test_taps_and_the_logits_of_one_pass(inception_file):
    def build(tap: str) -> Extractor:
        return extractor(f"inception:{inception_file}", allow_unknown_weights=True, tap=tap)

    images = pixels(2, 3, 48, 64)
    pool3 = build("pool3")
    features = pool3(images)
    assert features.shape == (2, 2048)
    for tap, bias in (("logits", True), ("logits_unbiased", False)):
        assert torch.allclose(build(tap)(images), pool3.logits(features, bias=bias), rtol=1e-5, atol=1e-6)
    spatial = build("spatial")
    maps = []
    spatial.inception.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _a, out: maps.append(out))
    found = spatial(images)
    assert found.shape == (2, 2023) and torch.equal(found.view(2, 17, 17, 7)[0, 3, 5], maps[0][0, :7, 3, 5])
    both = pool3.at("both")(images)
    assert torch.allclose(both, torch.cat([features, found], 1), rtol=1e-5, atol=1e-6)
    assert pool3.at("spatial").key == spatial.key and pool3.at("spatial").module is pool3.module
    with pytest.raises(DiffAccelError, match="Logits come from pool3 features"):
        spatial.logits(features)


@pytest.mark.slow
def test_protocols_are_different_numbers(inception_file):
    """And none resizes twice: at 299 pixels only the scale of pytorch-fid differs."""
    found = {
        protocol: extractor(f"inception:{inception_file}", allow_unknown_weights=True, protocol=protocol)
        for protocol in ("tf-fid", "pytorch-fid", "clean-fid")
    }
    small, full = pixels(1, 3, 64, 64), pixels(1, 3, 299, 299)
    features = {name: one(small) for name, one in found.items()}
    norm = features["tf-fid"].norm()
    assert all((features["tf-fid"] - features[name]).norm() > 1e-3 * norm for name in ("pytorch-fid", "clean-fid"))
    network = found["tf-fid"].inception
    expected = network.pool3((full.float() - 128) / 128)
    assert torch.allclose(found["tf-fid"](full), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found["clean-fid"](full), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found["pytorch-fid"](full), network.pool3(full.float() / 255 * 2 - 1), rtol=1e-5, atol=1e-6)
    resized = resize.pil_bicubic_float(small, (299, 299))
    assert torch.allclose(features["clean-fid"], network.pool3((resized - 128) / 128), rtol=1e-5, atol=1e-6)


# -- brought along ---------------------------------------------------------------------------------------------------


def test_transformers_outputs_are_not_taken_for_tensors():
    """transformers 5 returns an output object where it returned a tensor before."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20},
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8
        },
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    image = torch.rand(2, 3, 32, 32)
    pooled = model.visual_projection(model.vision_model(pixel_values=image).pooler_output)
    assert torch.allclose(rows(model.get_image_features(pixel_values=image)), pooled, atol=1e-6)
    assert torch.equal(rows((pooled, None)), pooled)
    with pytest.raises(DiffAccelError, match=r"must return a tensor \(B, dim\); got dict"):
        rows({"x": pooled})


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        features = self.layer(x.float().mean((2, 3)) / 255)
        return features if return_features else features.softmax(1)


def test_a_scripted_network(tmp_path):
    torch.manual_seed(0)
    module = Scripted()
    torch.jit.script(module).save(tmp_path / "mine.pt")
    found = extractor(f"torchscript:{tmp_path / 'mine.pt'}")
    images = pixels(3, 3, 8, 8)
    assert torch.allclose(found(images), module(images, True), atol=1e-6)
    assert found.key == f"FD-mine@{sha256(tmp_path / 'mine.pt')[:8]}" and found.dim == 5
    torch.save(module.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(DiffAccelError, match=r"plain.pt' is not a TorchScript file"):
        extractor(f"torchscript:{tmp_path / 'plain.pt'}")


def test_a_python_callable(monkeypatch):
    module = types.ModuleType("some_features")
    module.means = lambda x: x.float().mean((2, 3))
    module.means.weights_sha256 = "ab" * 32
    module.flat = lambda x: x.float().mean()
    monkeypatch.setitem(sys.modules, "some_features", module)
    found = extractor("py:some_features:means")
    assert (found.dim, found.key) == (3, "FD-some_features:means@abababab")
    assert torch.equal(found(pixels(2, 3, 4, 4)), pixels(2, 3, 4, 4).float().mean((2, 3)))
    with pytest.raises(DiffAccelError, match=r"returned shape \(\) .* expected \(1, dim\)"):
        extractor("py:some_features:flat")


@pytest.mark.gpu
def test_on_a_gpu_batches_do_not_matter_and_tf32_is_off(inception_file):
    images = pixels(16, 3, 64, 64)
    cpu = extractor(f"inception:{inception_file}", allow_unknown_weights=True)(images[:2])
    found = extractor(f"inception:{inception_file}", allow_unknown_weights=True, device="cuda")
    whole = found(images).cpu()
    parts = torch.cat([found(images[i : i + 1].cuda()).cpu() for i in range(16)])
    scale = whole.abs().max()
    assert (whole - parts).abs().max() <= 1e-5 * scale  # TF32 would differ in the third digit
    assert (whole[:2] - cpu).abs().max() <= 1e-4 * scale

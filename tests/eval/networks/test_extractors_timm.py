"""Networks of timm, and DINOv2 as published distances take it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks.extractors import extractor
from diffaccel.eval.networks.extractors.timm import resample_positions
from diffaccel.files import sha256


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_a_timm_network_with_its_own_preprocessing(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = extractor(f"timm:test_resnet:{tmp_path / 'weights.pth'}")
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    side = config["input_size"][1]
    for size in ((side, side), (90, 70)):  # at its own size it still enlarges and crops
        image = pixels(3, *size)
        expected = model.forward_head(model.forward_features(transform(pillow(image))[None]), pre_logits=True)
        assert torch.allclose(found(image[None]), expected, atol=1e-5)
    assert found.key == f"FD-test_resnet@{sha256(tmp_path / 'weights.pth')[:8]}"
    state = model.state_dict()
    del state["conv1.0.weight" if "conv1.0.weight" in state else next(iter(state))]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(DiffAccelError, match=r"is not a state dict of test_resnet.*Missing key"):
        extractor(f"timm:test_resnet:{tmp_path / 'less.pth'}")


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory) -> Path:
    """A small DINOv2 for 518 pixels, as its authors keep it: with a mask token, which no feature needs."""
    torch.manual_seed(0)
    state = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0).state_dict()
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, path)
    return path


@pytest.mark.slow
def test_dinov2_is_the_class_token_at_224(dinov2_file, tmp_path):
    images = pixels(2, 3, 100, 140)
    pil, fast = (extractor(f"dinov2:{dinov2_file}", protocol=p) for p in ("dgm-dinov2", "edm2-dinov2"))
    assert pil.key == f"FD-dinov2-vits14(sha={sha256(dinov2_file)[:8]})[dgm-dinov2]" and pil.dim == 384
    centre, scale = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    resized = torch.stack([
        torch.from_numpy(np.array(pillow(i).resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        for i in images
    ])  # fmt: skip
    smooth = torch.nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
    for found, x in ((pil, resized), (fast, smooth)):
        expected = found.module.forward_features((x / 255 - centre) / scale)[:, 0]
        assert torch.allclose(found(images), expected, atol=1e-4)
    assert extractor(f"dinov2:{dinov2_file}").protocol == "dgm-dinov2"
    torch.save({"cls_token": torch.zeros(1, 1, 5), "pos_embed": torch.zeros(1, 5, 5)}, tmp_path / "odd.pth")
    with pytest.raises(DiffAccelError, match="not a DINOv2 of width 384, 768, 1024"):
        extractor(f"dinov2:{tmp_path / 'odd.pth'}")


def test_positions_are_resampled_with_the_authors_offset():
    """A ramp stays one up to the ripple of the bicubic kernel, and its slope shows the scale, (16 + 0.1) / 37."""
    ramp = torch.arange(37.0).view(1, 37, 1, 1).expand(1, 37, 37, 2).reshape(1, 37 * 37, 2)
    token = torch.full((1, 1, 2), -5.0)
    found = resample_positions(torch.cat([token, ramp], 1), 16)
    assert found.shape == (1, 257, 2) and torch.equal(found[:, :1], token)
    column = found[0, 1:, 0].view(16, 16)[1:-1, 7]
    expected = (torch.arange(1, 15) + 0.5) * 37 / 16.1 - 0.5
    assert (column - expected).abs().max() < 0.06
    assert (column - ((torch.arange(1, 15) + 0.5) * 37 / 16 - 0.5)).abs().max() > 0.2
    same = torch.rand(1, 257, 3)
    assert resample_positions(same, 16) is same

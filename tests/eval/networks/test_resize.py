"""Resizing as the public codes do it, to the bit where they are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.eval.networks import resize


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(64, 64), (299, 299), (333, 120), (32, 40)])
def test_tf1_is_torch_fidelitys(size):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = images(2, 3, *size).float()
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert torch.equal(resize.tf1_bilinear(x, (299, 299)), expected)
    assert torch.equal(resize.tf1_bilinear(x.to(torch.uint8), (299, 299)), expected)


def test_tf1_by_hand():
    """Pixel i comes from i * in / out: no half-pixel centres, and the last ones repeat the edge."""
    x = torch.tensor([[[[0.0, 10.0]]]])
    assert resize.tf1_bilinear(x, (1, 4))[0, 0, 0].tolist() == [0, 5, 10, 10]
    assert torch.equal(resize.tf1_bilinear(images(1, 3, 5, 7), (5, 7)), images(1, 3, 5, 7).float())


@pytest.mark.parametrize("size", [(64, 48), (299, 299), (400, 320)])
def test_clean_fids_resizing_to_the_bit(size):
    theirs = pytest.importorskip("cleanfid.resize")
    image = images(3, *size)
    expected = theirs.build_resizer("clean")(image.permute(1, 2, 0).numpy())
    ours = resize.pil_bicubic_float(image[None], (299, 299))[0].permute(1, 2, 0).numpy()
    assert ours.dtype == np.float32 and np.array_equal(ours, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [(256, 256), (64, 512), (299, 100), (37, 299), (700, 300), (1, 3), (5, 2)])
def test_sums_as_pillows_to_the_bit(size, device):
    batch = images(3, 3, *size)
    for target in ((299, 299), (7, 11), size):
        expected = resize.pil_bicubic_float(batch, target)
        ours = resize.as_pillow(batch.to(device), target).cpu()
        assert ours.dtype == torch.float32 and ours.is_contiguous() and torch.equal(ours, expected)


def test_rows_come_first_whatever_the_shape():
    """Pillow 13 changes the order for tall images; a resize of one dimension leaves it no choice."""
    plane = images(700, 300).numpy().astype(np.float32)
    rows = np.asarray(Image.fromarray(plane).resize((299, 700), Image.Resampling.BICUBIC))
    expected = np.asarray(Image.fromarray(rows).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    found = resize.pil_bicubic_float(images(700, 300)[None, None], (299, 299))
    assert found.shape == (1, 1, 299, 299) and np.array_equal(found[0, 0].numpy(), expected)


def test_a_large_batch_is_resized_in_parts(monkeypatch):
    batch = images(5, 3, 20, 30)
    whole = resize.as_pillow(batch, (24, 70))
    for each in (1, 2):
        monkeypatch.setattr(resize, "_AT_ONCE", each * 3 * 20 * 30 * 2)
        assert torch.equal(resize.as_pillow(batch, (24, 70)), whole)


def test_pillow_and_back():
    image = images(3, 5, 9)
    assert torch.equal(resize.from_pil(resize.to_pil(image)), image)
    for size in ((64, 48), (20, 33)):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.array_equal(resize.pil_bicubic(image, size).permute(1, 2, 0).numpy(), np.asarray(expected))
    flat = torch.full((3, 40, 30), 77, dtype=torch.uint8)
    assert resize.pil_bicubic(flat, (8, 8)).unique().tolist() == [77]


def test_torchs_modes_keep_what_they_promise():
    flat = torch.full((1, 3, 20, 30), 12.0)
    for out in (
        resize.torch_bilinear(flat, (7, 9)),
        resize.torch_bicubic(flat, (7, 9), antialias=True),
        resize.torch_bicubic(flat, (7, 9), antialias=False),
    ):
        assert out.shape == (1, 3, 7, 9) and torch.allclose(out, torch.tensor(12.0), atol=1e-4)
    stripes = (torch.arange(66.0) % 2).expand(1, 3, 66, 66)  # thirds of them: only antialiasing averages
    sharp, smooth = (resize.torch_bicubic(stripes, (22, 22), antialias=a)[..., 2:-2] for a in (False, True))
    assert float(sharp.std()) > 0.4 and float(smooth.std()) < 0.1

"""Cosine scores in both conventions, and CLIPs of several kinds."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.clip_score import clip_i, clip_score, pooled, score


class Toy:
    """A CLIP that reads five characters and knows mean colours."""

    name = "toy"

    def __init__(self) -> None:
        self.read: list[str] = []
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return images.float().mean((2, 3)) + 1

    def texts(self, texts: list[str]) -> Tensor:
        self.read += texts
        return torch.tensor([[text.startswith(c) + 0.5 for c in "rgb"] for text in texts])

    def truncated(self, texts: list[str]) -> int:
        return sum(len(text) > 5 for text in texts)


def at_angles(*degrees: float) -> tuple[Tensor, Tensor]:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    a = torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(len(degrees), 2)
    return a, 0.5 * torch.stack([radians.cos(), radians.sin()], 1)


def test_the_score_clamps_each_sample_before_the_mean() -> None:
    a, b = at_angles(0, 60, 90, 120, 180)
    assert clip_score(a, b).tolist() == pytest.approx([100, 50, 0, 0, 0], abs=1e-12)
    assert clip_i(a, b).tolist() == pytest.approx([1, 0.5, 0, -0.5, -1], abs=1e-12)
    # the mean of cosines, clamped after, would be 0 here
    assert clip_score(a, b).mean().item() == pytest.approx(30)


def test_scale_and_precision_of_features_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 64, generator=generator) for _ in range(2))
    got = clip_i(a, b)
    assert got.dtype == torch.float64
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(clip_i(1e20 * a, 1e-20 * b), got, rtol=1e-6, atol=1e-7)  # squares overflow float32
    huge = a.clamp(-2, 2).half() * 20_000
    assert clip_score(huge, huge).tolist() == pytest.approx([100] * 6, abs=1e-12)
    assert (clip_i(a, a) <= 1).all()


def test_scores_of_images_and_prompts() -> None:
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    for i, channel in enumerate([0, 1, 2, 0, 1]):
        images[i, channel] = 200
    prompts = ["red", "green apple", "red", "red", "blue sky"]
    clip = Toy()
    got = score(clip, images, prompts, batch=2)
    assert got.key == "clip_score[toy]" and got.truncated == 2
    assert clip.read == ["red", "green apple", "blue sky"] and clip.batches == [2, 2, 1]
    pictures, texts = Toy()(images), Toy().texts(prompts)
    assert torch.equal(got.values, clip_score(pictures, texts))
    assert got.values[0] == got.values[3] > got.values[2]


def test_outputs_of_transformers_5_are_unwrapped() -> None:
    features = torch.ones(2, 3)
    assert pooled(features) is features
    assert pooled(SimpleNamespace(pooler_output=features, last_hidden_state=None)) is features
    with pytest.raises(DiffAccelError, match=r"must return a tensor of features, or .* got <class 'tuple'>"):
        pooled((features,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_score(torch.ones(2, 3), torch.ones(3, 3)), r"\(2, 3\) and \(3, 3\)"),
        (lambda: clip_score(torch.ones(3), torch.ones(3)), r"must be \(B, d\)"),
        (lambda: clip_score(torch.ones(0, 3), torch.ones(0, 3)), r"must be \(B, d\)"),
        (lambda: clip_score(torch.ones(2, 3).int(), torch.ones(2, 3)), "floats, not torch.int32"),
        (lambda: clip_i(torch.tensor([[1.0], [math.inf]]), torch.ones(2, 1)), "1 of 2 features .* first at 1"),
        (lambda: clip_i(torch.ones(2, 1), torch.tensor([[1.0], [0.0]])), "Feature 1 is all zeros"),
        (lambda: score(Toy(), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["a"]), "2 images, but 1 prompts"),
        (lambda: score(Toy(), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "ab"), "got one text"),
        (lambda: score(Toy(), torch.zeros(2, 3, 4, 4), ["a", "b"]), "uint8, not torch.float32"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffAccelError, match=message):
        call()

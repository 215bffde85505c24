"""A preview decoder of emoji-flux: what is saved, and the parts of its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from scripts import bench_preview
from scripts.zoo.emoji_preview import job, latents


def test_a_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = job.tiny_copy(job.tiny(4))
    assert 0 < job.save(model, tmp_path / job.NAME, {"training": {}}) <= job.LIMIT
    plain = AutoencoderTiny.from_pretrained(tmp_path / job.NAME, torch_dtype=torch.float32)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(plain.decode(z).sample, model.float().decode(z).sample)
    assert (tmp_path / job.NAME / "NOTICE").is_file()


def test_the_loss_is_zero_at_the_truth() -> None:
    class Exact:
        def decode(self, z: Tensor) -> object:
            return type("Decoded", (), {"sample": z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)})

        def encode(self, pictures: Tensor) -> object:
            return type("Encoded", (), {"latents": pictures[:, :, ::8, ::8]})

    z = torch.randn(2, 3, 4, 4)
    pictures = z.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert float(job.loss(Exact(), z, pictures)) == 0
    assert float(job.loss(Exact(), z, pictures + 0.1)) > 0.1


def test_the_collector_keeps_what_it_is_shown_by_level() -> None:
    collector = latents.Collector()
    for level in range(3):
        assert len(set(collector(torch.full((4, 1, 2, 2), float(level)), ["a", "b"] * 2).tolist())) == 2
    assert [float(x.mean()) for x in collector.levels] == [0, 1, 2] and collector.prompts[2] == ["a", "b", "a", "b"]


def test_ranks_are_compared_within_prompts() -> None:
    truth, cheap = torch.tensor([1.0, 2, 3, 13, 12, 11]), torch.tensor([1.0, 2, 3, 11, 12, 13])
    assert bench_preview.within(truth, cheap, ["a"] * 3 + ["b"] * 3) == pytest.approx([1.0, -1.0])

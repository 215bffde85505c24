"""Scores on the way: cheap decoders, levels that are not scored, and where the seconds go."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from search_bed import latent_reward, plan, play
from self_contracts import redness
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, Drafts
from diffaccel.samplers.search import preview, scoring

SEARCHES = [
    RBF(reward=redness, budget=30, particles=1, initial=4, chunk=4),
    SVDD(reward=redness, budget=30, particles=1),
    SMC(reward=redness, budget=24),
    Drafts(reward=redness, budget=24, drafts=4),
]


def searched(config: Any, **changes: Any) -> tuple[Tensor, dict[str, Any]]:
    pipe = diffaccel.accelerate(tiny.make("flux"), config)
    images = pipe(**{**tiny.call_kwargs("flux", steps=4), **changes}).images
    return images, diffaccel.summary(pipe).last_run["report"]


@pytest.mark.parametrize("config", SEARCHES, ids=lambda config: config.name)
def test_the_full_decoder_as_a_preview_changes_nothing(config: Any) -> None:
    """One picture in a call: of several, those that end are decoded apart, which may round otherwise."""
    one = {"prompt": "a red apple", "negative_prompt": "blurry", "generator": torch.Generator().manual_seed(3)}
    plain, report = searched(config, **one)
    one["generator"] = torch.Generator().manual_seed(3)
    same, other = searched(replace(config, preview="full"), **one)
    assert torch.equal(plain, same)
    assert other["search"]["pictures"] == report["search"]["pictures"]


@pytest.mark.parametrize("config", [SEARCHES[0], SEARCHES[3]], ids=lambda config: config.name)
def test_a_sample_is_scored_in_full(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewards of what comes back are those of the pipeline's own pictures."""
    full: list[int] = []
    pixels = scoring.PictureScorer.pixels

    def noted(self: Any, x0: Tensor, *, preview: bool = False) -> Tensor:
        full.extend([] if preview else [len(x0)])
        return pixels(self, x0, preview=preview)

    monkeypatch.setattr(scoring.PictureScorer, "pixels", noted)
    images, report = searched(replace(config, preview="linear"), output_type="pt")
    rewards = redness(images.float(), [])
    assert [p["reward"] for p in report["search"]["pictures"]] == pytest.approx(rewards.tolist(), abs=2e-3)
    assert 0 < sum(full) < sum(p["scored"] for p in report["search"]["pictures"]) + scoring.CHECKED


def test_the_linear_map_is_exact_for_a_linear_decoder() -> None:
    with diffaccel.open_session(tiny.make("flux"), **tiny.call_kwargs("flux", steps=4)) as session:
        mix = torch.randn(3, session.x.shape[1], generator=torch.Generator().manual_seed(1))
        inverse = torch.linalg.pinv(mix)
        pool = torch.nn.AdaptiveAvgPool2d(tuple(session.x.shape[-2:]))

        def encode(self: Any, pipe: Any, pixels: Tensor) -> Tensor:
            return torch.einsum("cd,rdhw->rchw", inverse, pool(pixels))

        session.family = type("Linear", (), {"encode": encode})()
        decode = preview.fit_linear(session, torch.device("cpu"))
        colours = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
        pictures = colours.expand(4, 3, session.height, session.width)
        torch.testing.assert_close(decode(encode(None, None, pictures)), pictures, rtol=0, atol=2e-3)


def test_a_folder_of_a_tiny_autoencoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    channels = tiny.make("flux").vae.config.latent_channels
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=channels, upsampling_scaling_factor=2,
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=channels + 1,
    ).save_pretrained(tmp_path / "other")  # fmt: skip
    one, report = searched(replace(SEARCHES[0], preview=str(tmp_path / "tiny")))
    assert torch.isfinite(one).all() and report["search"]["method"]["preview"].endswith("tiny")
    with pytest.raises(DiffAccelError, match=f"takes latents of {channels + 1} channels"):
        searched(replace(SEARCHES[0], preview=str(tmp_path / "other")))
    with pytest.raises(DiffAccelError, match="no folder of a diffusers AutoencoderTiny"):
        searched(replace(SEARCHES[0], preview=str(tmp_path / "none")))


@pytest.mark.slow
def test_a_decoder_of_shuffled_channels_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with diffaccel.open_session(tiny.make("flux"), **tiny.call_kwargs("flux", steps=4)) as session:
        full = session.decoder()
        config = replace(SEARCHES[0], preview=lambda x0: full(x0.flip(1)))
        with caplog.at_level(logging.WARNING, preview.__name__):
            searched(config)
        assert "rank correlation" in caplog.text
        caplog.clear()
        searched(replace(SEARCHES[0], preview=full))
    assert "rank correlation" not in caplog.text


@pytest.mark.parametrize(
    "a, b, expected", [([1, 2, 3], [1, 4, 9], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 2], [1, 2, 3], 0.866025)]
)
def test_rank_correlation(a: list[float], b: list[float], expected: float) -> None:
    assert preview.rank_correlation(a, b) == pytest.approx(expected, abs=1e-6)


def test_previews_that_cannot_be() -> None:
    with pytest.raises(DiffAccelError, match="preview has no effect with guide"):
        BoN(guide=0.1, preview="linear")
    with pytest.raises(DiffAccelError, match="preview is int"):
        searched(replace(SEARCHES[0], preview=3))


# -- levels that are scored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [RBF(budget=90, initial=3), SVDD(budget=90, particles=2), CoDe(budget=90, particles=2, block=1), SMC(budget=90)],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("first, every", [(0.5, 1), (0.0, 2), (0.25, 3), (0.9, 1)])
def test_only_the_levels_that_are_due_are_scored(config: Any, first: float, every: int) -> None:
    config = replace(config, score_from=first, score_every=every)
    played = play(config, 90, plan(8), lambda move: float(move.key.attempt), first=int(first * 8), every=every)
    scored = {move.stage for moves in played.moves for move in moves if move.score and not move.end}
    begin = min(int(first * 8), 6) if config.name == "rbf" else int(first * 8)
    assert scored == {stage for stage in range(begin, 8) if (stage - begin) % every == 0} | {7}
    assert 60 < played.search.ledger.nfe <= 90
    assert played.search.samples[0].end


def test_levels_that_cannot_be() -> None:
    with pytest.raises(DiffAccelError, match="score_from is 1"):
        SMC(score_from=1.0)
    with pytest.raises(DiffAccelError, match="score_every is 0"):
        SMC(score_every=0)
    assert "score_from" not in RBF().to_dict() and "preview" not in RBF().to_dict()


# -- seconds -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_seconds_of_a_search_are_told_by_part() -> None:
    _, report = searched(SEARCHES[0])
    seconds = report["search_seconds"]
    assert set(seconds) == {"network", "decode", "reward", "engine", "whole"}
    parts = sum(seconds[part] for part in ("network", "decode", "reward", "engine"))
    assert parts == pytest.approx(seconds["whole"])
    assert all(seconds[part] > 0 for part in ("network", "decode", "reward"))
    _, bare = searched(replace(SEARCHES[0], reward=latent_reward(lambda x0: x0.flatten(1).mean(1))))
    assert bare["search_seconds"]["decode"] == 0

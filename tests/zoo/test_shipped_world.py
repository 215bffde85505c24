"""The embedded world model: complete, accepted, and it draws what the game would."""

import pytest
import torch

import diffaccel
from diffaccel import zoo
from diffaccel.models.next_frame import beginnings
from diffaccel.zoo import packing

WORLD = "coinrun-nfd"
pytestmark = pytest.mark.skipif(WORLD not in zoo.names(), reason="no trained weights are in this checkout yet")


def test_card_and_notices():
    card, folder = zoo.card(WORLD), zoo.path(WORLD, verify=True)
    assert card["state"] == "accepted" and all(row["passed"] for row in card["acceptance"])
    assert "CC-BY" in (folder / "NOTICE").read_text() and (folder / "LICENSE-APACHE").stat().st_size
    assert sum(entry["size"] for entry in packing.read_manifest(zoo._ROOT / WORLD)["packed"].values()) <= 8e6


@pytest.mark.slow
def test_the_next_frame_is_the_game_s():
    """The last frame of each beginning, drawn from the ones before it and its action."""
    pipe = diffaccel.load(WORLD)
    own = beginnings.read(zoo.path(WORLD), pipe.transformer.frame_shape)
    frames, actions = torch.stack([one.frames for one in own]), torch.stack([one.actions for one in own])
    drawn = pipe(actions[:, -1:], frames[:, :-1], actions[:, :-1], num_inference_steps=4).frames[:, 0].clamp(-1, 1)

    def psnr(picture):
        return -10 * torch.log10(((picture - frames[:, -1]) / 2).square().mean((1, 2, 3)))

    still, right = psnr(frames[:, -2]), psnr(drawn)
    assert right.mean() > still.mean() + 4 and right.mean() > 26, (right, still)
    other = pipe((actions[:, -1:] + 4) % 9, frames[:, :-1], actions[:, :-1], num_inference_steps=4).frames[:, 0]
    assert psnr(other.clamp(-1, 1)).mean() < right.mean() - 2  # another action, another frame

"""A folder has one search at a time: a second one is refused, and the first ends as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from search_bed import latent_reward
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import BoN, Drafts
from diffaccel.samplers.search import report


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", lambda told, file: file.write(b"plot"))


def config(kind: Any, folder: Path | None, before: Any = lambda: None) -> Any:
    def score(x0: Tensor) -> Tensor:
        before()
        return x0.flatten(1).mean(1)

    reward = latent_reward(score, identity="the mean of a row")
    return kind(reward=reward, budget=20, folder="" if folder is None else str(folder))


def draw(kind: Any, folder: Path | None, before: Any = lambda: None, network: Any = None) -> Tensor:
    pipe = diffaccel.accelerate(tiny.make("sd"), config(kind, folder, before))
    if network is not None:
        pipe.unet.register_forward_pre_hook(lambda module, args: network())
    return pipe(**tiny.call_kwargs("sd", batch=1, steps=3, guided=False)).images


@pytest.mark.parametrize("kind", [BoN, Drafts])
def test_a_second_search_in_the_folder_is_refused_and_the_first_one_goes_on(kind: Any, tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        leftover = tmp_path / ".latents.safetensors.0123abcd.tmp"  # as the first one writes it
        leftover.touch()
        with pytest.raises(DiffAccelError, match="is being written by another run") as caught:
            draw(kind, tmp_path)
        assert leftover.exists()
        leftover.unlink()
        refused.append(caught.value)

    expected = draw(kind, None)
    assert torch.equal(draw(kind, tmp_path, other), expected) and refused
    assert not (tmp_path / ".lock").exists()
    assert torch.equal(draw(kind, tmp_path), expected), "the folder is free again"


def test_a_call_that_failed_gives_the_folder_back_though_its_traceback_is_kept(tmp_path: Path) -> None:
    """As an interactive session keeps it, and with it the frames of the search."""
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        draw(BoN, tmp_path, network=fail)
    assert torch.equal(draw(BoN, tmp_path), draw(BoN, None)) and kept.tb is not None

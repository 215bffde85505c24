"""A search while it runs: what the pipeline's callback is shown of it, and several prompts in one folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from self_contracts import redness
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import RBF, BoN, Drafts
from diffaccel.samplers.rewards import Reward
from diffaccel.samplers.search import report, watching

STEPS = 4


def call(**changes: Any) -> dict[str, Any]:
    return {**tiny.call_kwargs("flux", steps=STEPS), "output_type": "pt", **changes}


def test_the_callback_sees_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, shown = tiny.make("flux"), []

    def seen(pipe: Any, step: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        shown.append((step, given))
        return {"latents": torch.zeros_like(given["latents"])} if "preview" in given else {}

    diffaccel.accelerate(pipe, RBF(reward=redness, budget=24, particles=1, initial=2, watch=True))
    images = pipe(**call(callback_on_step_end=seen)).images
    run = diffaccel.summary(pipe).last_run["report"]["search"]["pictures"]
    *rounds, (_, last) = shown
    assert "preview" not in last and set(last) == {"latents"}, "the end is the call's own step"
    assert len(rounds) >= STEPS and [given["nfe"] for _, given in rounds] == sorted(g["nfe"] for _, g in rounds)
    assert all(0 <= step < STEPS and given["budget"] == 48 for step, given in rounds)
    for row in range(2):
        best = [given["rewards"][row] for _, given in rounds[:-1]]
        assert best == sorted(best), "the best of predictions never falls"
    for _, given in rounds:
        torch.testing.assert_close(redness(given["preview"], []).tolist(), given["rewards"], rtol=0, atol=1e-6)
        assert given["latents"].shape == last["latents"].shape
    assert all(a >= b for a, b in zip((p["climb"][-2]["reward"] for p in run), rounds[0][1]["rewards"], strict=True))
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, RBF(reward=redness, budget=24, particles=1, initial=2))
    shown.clear()
    assert torch.equal(pipe(**call(callback_on_step_end=seen)).images, images), "looking on changes nothing"
    assert len(shown) == 1, "without `watch` the callback is called for the call's own step"
    with pytest.raises(DiffAccelError, match=r"Drafts\.watch is True, which has no effect"):
        Drafts(watch=True)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BoN(budget=12, wave=1), BoN(budget=12, wave=1, draw=0.3)], ids=["best", "drawn"])
def test_prompts_of_one_call_share_a_folder_and_are_resumed(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One search each; a killed call goes on when it is repeated, with the same pictures and the same files."""
    monkeypatch.setattr(report, "plot", lambda told, file: file.write(b"plot"))
    pipe, left = tiny.make("flux"), [10**6]

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt("killed")
        return redness(images, prompts)

    def run(folder: Path, calls: int) -> Tensor:
        left[0] = calls
        reward = Reward(name="redness", function=score, batch_size=8, identity="redness")
        diffaccel.accelerate(pipe, replace(config, reward=reward, keep=1, folder=str(folder)))
        try:
            return pipe(**call(prompt=["a red apple", "a blue car"])).images
        finally:
            diffaccel.remove(pipe)

    whole = run(tmp_path / "whole", 10**6)
    with pytest.raises((KeyboardInterrupt, DiffAccelError), match="killed"):
        run(tmp_path / "killed", 2)
    assert torch.equal(run(tmp_path / "killed", 10**6), whole)
    folders = [tmp_path / "whole", tmp_path / "killed"]
    files = [{f.name: f.read_bytes().replace(bytes(folder), b"") for f in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert {name[:3] for name in files[0] if name.endswith(".png") and name[0] == "0"} == {"000", "001"}


@pytest.mark.parametrize("rewards", [(1e308, 1e308), (float("inf"), float("-inf"))])
def test_rewards_of_any_size_end_no_search_by_the_note_of_its_bar(rewards: tuple[float, float]) -> None:
    searches: Any = [SimpleNamespace(best=SimpleNamespace(reward=reward)) for reward in rewards]
    assert watching.note_of(searches) == f"reward {rewards[0] / 2 + rewards[1] / 2:.4g}"

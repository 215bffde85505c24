"""Searches on a CUDA device: what scoring elsewhere, bfloat16 and more budget do, and do not, change."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import diffaccel
from diffaccel.samplers import RBF, BoN
from diffaccel.samplers.rewards import Reward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 4


def mean(x0: Tensor, prompts: list[str]) -> Tensor:
    return x0.float().flatten(1).mean(1)


def latent_reward(device: str | None = None) -> Reward:
    return Reward("mean", mean, input="latents", device=None if device is None else torch.device(device))


def searched(pipe: Any, family: str, config: Any) -> tuple[Tensor, dict[str, Any]]:
    """The pictures, and what the search cost."""
    diffaccel.accelerate(pipe, config)
    try:
        call = tiny.call_kwargs(family) | {"num_inference_steps": STEPS}
        found = pipe(**call).images
        cost = diffaccel.summary(pipe).last_run
    finally:
        diffaccel.remove(pipe)
    return found, cost


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
def test_one_sample_in_bf16_is_eulers_to_the_bit(family: str) -> None:
    pipe = tiny.make(family).to("cuda", torch.bfloat16)
    found, _ = searched(pipe, family, BoN(reward=latent_reward(), budget=STEPS))
    diffaccel.accelerate(pipe, diffaccel.samplers.Euler())
    assert torch.equal(found, pipe(**(tiny.call_kwargs(family) | {"num_inference_steps": STEPS})).images)


@pytest.mark.parametrize("path", ["native", "linear", "vp"])
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_scoring_on_the_cpu_changes_no_decision(family: str, path: Any) -> None:
    pipe = tiny.make(family).to("cuda")
    shared = {"budget": 60, "particles": 4, "initial": 2, "chunk": 2, "path": path, "max_batch": 1}
    pictures, logs = {}, {}
    for where in ("cuda", "cpu"):
        pictures[where], cost = searched(pipe, family, RBF(reward=latent_reward(where), **shared))
        found = [one["decisions"] for one in cost["report"]["search"]["pictures"]]
        logs[where] = [sorted(log, key=lambda entry: (entry["chain"], entry["stage"])) for log in found]
    assert torch.equal(pictures["cpu"], pictures["cuda"])
    for one, other in zip(logs["cpu"], logs["cuda"], strict=True):
        assert one and len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)  # two devices sum in two orders


@pytest.mark.parametrize("method", [RBF, BoN], ids=lambda m: m.name)
def test_memory_does_not_follow_the_budget(method: Any) -> None:
    pipe = tiny.make("flux").to("cuda")
    shape = {"particles": 2, "chunk": 4} if method is RBF else {"wave": 8}
    peaks = []
    for budget in (64, 64, 640):  # the first one warms up
        torch.cuda.reset_peak_memory_stats()
        searched(pipe, "flux", method(reward=latent_reward(), budget=budget, **shape))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.01 * peaks[1]

"""Training of world models on a GPU: compiled steps, exact derivatives, distillation in bf16."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor

from diffaccel.distill.next_frame import consistency, trigflow
from diffaccel.distill.next_frame.attention import LayoutAttention
from diffaccel.distill.next_frame.layouts import cached_layout
from diffaccel.distill.next_frame.options import WorldConsistency
from diffaccel.distill.next_frame.train import train_consistency
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.training.loop import TrainingPlan
from scripts.zoo.coinrun import probe
from scripts.zoo.coinrun import recipe as recipes
from tests.support.worlds import clip, tiny_world

pytestmark = pytest.mark.gpu


def test_the_compiled_network_trains():
    probe.main("full", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_derivative_is_that_of_finite_differences(dtype):
    model = tiny_world(dtype).cuda()
    layout = cached_layout(9, model.config.window, 4, 2, "cuda")
    x, sigma, actions = (part.cuda() for part in clip(model, 9))
    z, t = trigflow.from_linear(x, sigma, 0.5)
    t, dz, moving = t.clamp(0.2, 1.3), torch.randn_like(z), ~layout.cached
    attend, h = LayoutAttention(model, layout, "math"), 1e-6 if dtype == torch.float64 else 1e-3

    def prediction(z: Tensor, t: Tensor) -> Tensor:
        return trigflow.scaled_prediction(lambda x, s: model(x, s, actions, layout.source, attend), z, t, 0.5)

    _, slope = consistency.derivative(prediction, z, t, dz, moving, "jvp", 0.0)
    along = moving.to(dtype).expand_as(t)
    move = h * trigflow.per_pixel(along) * dz
    with torch.no_grad():
        difference = (prediction(z + move, t + h * along) - prediction(z - move, t - h * along)) / (2 * h)
    if dtype == torch.float64:
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)
    else:  # fast waves of the level bend within the step, so only the direction is compared
        cosine = torch.nn.functional.cosine_similarity(
            slope[:, moving].flatten(), difference[:, moving].flatten(), dim=0
        )
        assert cosine > 0.9


@pytest.mark.parametrize("form", ["solve", "secant", "jvp", "paper"])
def test_distilling_steps_are_finite(tmp_path, form):
    recipe = recipes.get("full")
    plan = TrainingPlan(lr=1e-4, samples=24, warmup=1)
    options = (
        WorldConsistency.paper(batch=8, plan=plan)
        if form == "paper"
        else WorldConsistency(batch=8, plan=plan, tangent=form)
    )
    teacher = NextFrameTransformer(**recipe.model).cuda()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    begin = time.monotonic()
    run = train_consistency(
        copy.deepcopy(teacher), teacher, probe.RandomClips(recipe), options, tmp_path, dtype=torch.bfloat16
    )
    assert run.step == 3 and all(bool(p.isfinite().all()) for p in run.parameters)
    assert any(not torch.equal(p, q) for p, q in zip(run.parameters, teacher.parameters(), strict=False))
    print(f"{form}: {time.monotonic() - begin:.2f} s for 3 steps of 8 sequences, "
          f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")  # fmt: skip

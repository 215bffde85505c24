"""Distillation on a GPU: bf16 runs of one and two calls, memory of one network at a time, low rank, evaluation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from diffaccel import zoo
from diffaccel.distill.evaluation import PictureEvaluation
from diffaccel.distill.meter import converged
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.distill.train import distil
from diffaccel.eval.networks import extractors
from diffaccel.training.steps import backward, computing
from scripts.bench_distill import LARGE, make_teacher
from scripts.zoo.fashion import recipe, unet

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"student_steps": 2}, {"student_steps": 2, "rank": 4}])
def test_a_run_in_bf16_is_looked_at_and_resumes(options: dict[str, int], tmp_path: Path) -> None:
    pipe = tiny.make("flux").to("cuda")
    call = {k: v for k, v in tiny.call_kwargs("flux").items() if k in ("height", "width", "max_sequence_length")}
    looked = PictureEvaluation(pipe, ("a", "b", "c"), call, extractors.extractor("tiny", device="cuda"), batch=2)
    config = SIM(steps=4, batch=4, lr=1e-3, ema_pictures=0, **options)
    common = {"arguments": call, "dtype": BF16, "evaluate_every": 8, "evaluate": looked}
    run = distil(pipe, ("a", "b", "c", "d"), config, tmp_path, **common)
    assert run.step == 4 and (tmp_path / "log.jsonl").read_text().count('"fd"') == 2
    assert distil(pipe, ("a", "b", "c", "d"), config, tmp_path, **common).step == 4
    teacher = PipelineTeacher(pipe, ("a", "b", "c", "d"), 4, call)
    assert all(value == value for value in converged(Distillation(teacher, config, tmp_path, dtype=BF16)).values())


@pytest.mark.parametrize("kind", ["fashion", "emoji"])
def test_gradients_in_bf16_are_those_of_float32(kind: str) -> None:
    """As scripts train them: attention with heads of 16, and a FLUX transformer with text and pictures together."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda")

    if kind == "fashion":
        network = unet.build(recipe.FULL, 0).cuda()
        x, labels = normal(64, 1, 32, 32), torch.arange(64, device="cuda") % 10
        call = partial(unet.ask, network, x, torch.full((64,), 0.5), labels)
    else:
        network = load_emoji()
        x, text, pooled = normal(64, 64, 64), normal(64, 32, 1), normal(64, 1)
        config = network.config
        call = partial(
            _first, network, hidden_states=x[..., : config.in_channels],
            encoder_hidden_states=text.expand(-1, -1, config.joint_attention_dim),
            pooled_projections=pooled.expand(-1, config.pooled_projection_dim), timestep=torch.full((64,), 0.5).cuda(),
            img_ids=torch.zeros(64, 3).cuda(), txt_ids=torch.zeros(32, 3).cuda(), return_dict=False,
        )  # fmt: skip
    weights, gradients = list(network.parameters()), []
    for dtype in (torch.float32, BF16):
        with computing(torch.device("cuda"), dtype):
            loss = call().float().square().mean()
        backward(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in weights if p.grad is not None]))
        network.zero_grad(set_to_none=True)
    exact, rough = gradients
    assert bool(rough.isfinite().all()) and 0.9 < float(rough.norm() / exact.norm()) < 1.1
    assert float(torch.nn.functional.cosine_similarity(exact, rough, 0)) > 0.98


def load_emoji() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    folder = zoo.path("emoji-flux") / "transformer"
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).cuda()


def _first(network: torch.nn.Module, **call: Any) -> torch.Tensor:
    return network(**call)[0]


def test_one_network_at_a_time_takes_at_most_half_the_activations(tmp_path: Path) -> None:
    teacher, peaks = make_teacher(LARGE, 128, torch.device("cuda")), []
    for sequential in (False, True):
        config = SIM(batch=128, ema_pictures=128, sequential=sequential)
        run = Distillation(teacher, config, tmp_path / str(sequential), dtype=BF16)
        run.turn()  # the moments are there from now on
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.turn()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del run
        torch.cuda.empty_cache()
    assert peaks[1] <= 0.5 * peaks[0]

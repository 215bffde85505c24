"""fashion-unet: a class-conditional UNet that draws by flow matching, and how it and its students are asked.

    x_t = (1 - t) x0 + t eps,   v = eps - x0,   loss = mean |unet(x_t, 1000 t, label) - v|^2

with a logit-normal ``t``. Label 10 stands for none.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from diffaccel.distill import NetworkTeacher, SIMFewStepScheduler, SIMOneStepScheduler, TrajectoryScheduler
from diffaccel.distill.stage import StageOptions
from diffaccel.training.checkpoint import averages
from diffaccel.training.loop import Deadline, TrainingPlan, TrainingRun
from diffaccel.training.steps import computing
from scripts.zoo.fashion.data import CLASSES, PADDED, Pictures, padded
from scripts.zoo.fashion.recipe import FashionRecipe

NAME = "teacher"
NO_LABEL = len(CLASSES)


def build(recipe: FashionRecipe, seed: int) -> UNet2DModel:
    """Return a UNet with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(**recipe.unet)


def ask(network: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """Return the velocity at levels ``(B,)``."""
    return network(x, 1000 * sigma.to(x.device), class_labels=labels, return_dict=False)[0]


def train(
    data: Pictures, recipe: FashionRecipe, plan: TrainingPlan, work: Path, *, deadline: Deadline, seed: int = 0
) -> TrainingRun:
    """Train, or go on with, ``work/teacher.safetensors``."""
    device = data.images.device
    network = build(recipe, seed).to(device)
    run = TrainingRun(
        work, NAME, {"unet": network}, plan, seed=seed + 1, deadline=deadline, device=device,
        tell=partial(print, flush=True),
    )  # fmt: skip
    for _ in run:
        rows = torch.randint(len(data), (recipe.batch,), generator=run.generator, device=device)
        x0 = padded(data.images[rows])
        is_empty = torch.rand(recipe.batch, generator=run.generator, device=device) < recipe.empty
        labels = torch.where(is_empty, NO_LABEL, data.labels[rows])
        sigma = torch.randn(recipe.batch, generator=run.generator, device=device).sigmoid()
        eps = torch.randn(x0.shape, generator=run.generator, device=device)
        level = sigma[:, None, None, None]
        with computing(device, torch.bfloat16 if device.type == "cuda" else torch.float32):
            v = ask(network, (1 - level) * x0 + level * eps, sigma, labels)
        run.update((v.float() - (eps - x0)).square().mean(), recipe.batch)
    return run


def load(work: Path, recipe: FashionRecipe, device: torch.device) -> UNet2DModel | None:
    """Return the averaged teacher of a work folder; None where there is none."""
    file = work / f"{NAME}.safetensors"
    if not file.is_file():
        return None
    network = build(recipe, 0)
    network.load_state_dict(averages(file, "unet."))
    return network.to(device).eval()


def without_labels(network: UNet2DModel, label: int = NO_LABEL) -> UNet2DModel:
    """Return the network under one label as a network that has none: the label's vector goes into that of the time."""
    plain = UNet2DModel.from_config({**network.config, "num_class_embeds": None})
    state = dict(network.state_dict())
    vector = state.pop("class_embedding.weight")[label]
    state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + vector
    plain.load_state_dict(state)
    return plain.to(network.device).eval().requires_grad_(False)


def teacher_of(network: UNet2DModel, batch: int) -> NetworkTeacher:
    """Return the teacher of a run of distillation, under labels of which every batch has as many of each class."""
    labels = torch.arange(batch, device=network.device) % len(CLASSES)
    return NetworkTeacher(network, ask, "velocity", (1, PADDED, PADDED), conditions=(labels,))


def own_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the teacher's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def student_scheduler(config: StageOptions) -> SIMOneStepScheduler:
    """Return the scheduler of a student of these options."""
    levels = [(1 - sigma, sigma, 1000 * sigma) for sigma in config.student_levels]
    if len(levels) > 1:
        several = SIMFewStepScheduler if config.fresh_noise else TrajectoryScheduler
        return several(levels, "velocity", config.start)
    return SIMOneStepScheduler(*levels[0], "velocity", config.start)


@torch.no_grad()
def draw(network: UNet2DModel, scheduler: Any, labels: Tensor, steps: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return drawings ``(N, 1, 32, 32)`` of labels by a stock scheduler, from noise that was drawn on the CPU."""
    device = network.device
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (len(labels), 1, PADDED, PADDED)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    scaled = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    with computing(device, dtype):
        for t in scheduler.timesteps:
            v = network(scaled(x, t), t.expand(len(x)), class_labels=labels.to(device), return_dict=False)[0]
            x = scheduler.step(v.float(), t, x, return_dict=False)[0]
    return x

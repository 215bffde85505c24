"""Train the network that reads actions off frames; it judges what the world model draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diffaccel.distill.next_frame.train import Clips
from diffaccel.eval.networks.inverse_dynamics import CONTEXT, InverseDynamics
from diffaccel.training.checkpoint import averages
from diffaccel.training.loop import Deadline, TrainingRun
from diffaccel.training.steps import computing
from scripts.zoo.coinrun.pool import to_unit
from scripts.zoo.coinrun.recipe import Recipe
from scripts.zoo.coinrun.simulator import ACTIONS, NULL_ACTION

NAME = "dynamics"
_FRAMES = 8  # of each clip that a step looks at


def build(recipe: Recipe) -> InverseDynamics:
    """Build the network."""
    return InverseDynamics(len(ACTIONS), width=recipe.dynamics_width)


def train(
    clips: Clips,
    recipe: Recipe,
    work: Path,
    *,
    deadline: Deadline | None,
    device: str,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> TrainingRun:
    """Train, or go on with, ``work/dynamics.safetensors`` by cross entropy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(recipe).to(device)
    run = TrainingRun(
        work, NAME, {"network": network}, recipe.dynamics, seed=seed, deadline=deadline, device=device, tell=tell
    )
    for _ in run:
        frames, actions = clips.draw(recipe.dynamics_batch, run.generator)
        actions = actions[:, CONTEXT - 1 : _FRAMES]
        with computing(run.device, torch.bfloat16 if run.device.type == "cuda" else torch.float32):
            logits = network(to_unit(frames[:, :_FRAMES]))
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), actions.flatten(), ignore_index=NULL_ACTION)
        run.update(loss, recipe.dynamics_batch)
    return run


def load(work: Path, recipe: Recipe, device: str) -> InverseDynamics | None:
    """Load the averaged weights of a work folder; None without any."""
    file = work / f"{NAME}.safetensors"
    if not file.is_file():
        return None
    network = build(recipe)
    network.load_state_dict(averages(file, "network."))
    return network.to(device).eval()

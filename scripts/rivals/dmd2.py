"""DMD2 (arXiv 2405.14867): distribution matching with five assistant steps a turn, and a critic of real pictures.

The generator follows the difference of the assistant's and the teacher's clean estimates, both constants, and a head on
the assistant's bottleneck that tells noised drawings from noised pictures:

    assistant:  denoising + 1e-2 (softplus(-D(x_t)) of pictures + softplus(D(x_t)) of drawings)
    generator:  matching  + 3e-3  softplus(-D(x_t)) of drawings
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffaccel.distill import SIM
from diffaccel.distill.drawing import coefficients, generate, guided
from diffaccel.distill.learner import learner
from diffaccel.distill.learning import LearningRun, decay_of
from diffaccel.distill.parameterization import target
from diffaccel.distill.steps import Draw, frozen, matching_loss
from diffaccel.distill.teacher import NetworkTeacher
from diffaccel.training.loop import Deadline
from diffaccel.training.steps import backward
from scripts.rivals.bed import Bed, Rival, Try
from scripts.zoo import turns
from scripts.zoo.fashion import unet

FILE = "checkpoint.safetensors"
FOR_ASSISTANT, FOR_GENERATOR = 1e-2, 3e-3  # weights of the critic


class Critic(nn.Module):
    """A UNet with a head on its bottleneck; every call leaves the head's ``logits (B,)`` beside the output."""

    def __init__(self, network: nn.Module, seed: int) -> None:
        super().__init__()
        self.unet = network
        wide = network.config.block_out_channels[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Conv2d(wide, wide, 4, stride=2, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(wide, 1),
            )  # fmt: skip
        self.head.to(network.device)
        network.mid_block.register_forward_hook(self._look)
        self.logits = torch.empty(0)

    def _look(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logits = self.head(output)[:, 0].float()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.unet(*inputs, **named)


class DMD2Run(LearningRun):
    """One run; its student is the generator's average.

    Args:
        bed: whose real pictures the critic sees.
    """

    config: SIM

    def __init__(self, bed: Bed, teacher: NetworkTeacher, config: SIM, folder: Any, seed: int) -> None:
        self.bed = bed
        generator, self.assistant = learner(teacher.network), Critic(learner(teacher.network), seed)
        rates = {name: (config.lr, 0.0) for name in ("generator", "assistant")}
        super().__init__(
            teacher, config, folder, {"generator": generator, "assistant": self.assistant}, rates,
            {"average": decay_of(config)}, seed=seed, dtype=bed.dtype, tell=bed.tell,
        )  # fmt: skip

    def turn(self) -> None:
        config, random = self.config, self.reseed()
        for _ in range(config.assistant_steps):
            draw = Draw.new(self.teacher, config.assistant_law, config, random, self.device, (0, 1))
            real = self.bed.real(self.teacher.conditions[0], random)
            with self.autocast():
                denoising, critic = self.assistant_losses(draw, real)
            backward(denoising + FOR_ASSISTANT * critic)
            self._update("assistant", self.assistant)
            self._note({"assistant": denoising.detach(), "critic": critic.detach()})
        draw = Draw.new(self.teacher, config.generator_law, config, random, self.device, (0, 1))
        with frozen(self.teacher.network, self.assistant), self.autocast():
            matching, fooled, shown = self.generator_losses(draw)
            backward(matching + FOR_GENERATOR * fooled)
        self._update("generator", self.generator)
        self.average.update()
        self._note({**shown, "fooled": fooled.detach()})

    def assistant_losses(self, draw: Draw, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of denoising drawings, and that of telling them from pictures at the same levels."""
        teacher = self.teacher
        with torch.no_grad():
            x0 = generate(teacher, self.generator, draw.z, draw.group, self.config)
        a, s = coefficients(teacher, draw.sigma, x0)
        x_t = a * x0 + s * draw.eps
        out = teacher.ask(self.assistant, x_t, draw.sigma, draw.group)
        of_drawings = self.assistant.logits
        teacher.ask(self.assistant, a * real + s * draw.eps, draw.sigma, draw.group)
        wanted = target(teacher.kind, x0, draw.eps, x_t, a, s)
        critic = F.softplus(of_drawings).mean() + F.softplus(-self.assistant.logits).mean()
        return (out.float() - wanted).square().mean(), critic

    def generator_losses(self, draw: Draw) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of matching and that of the critic; the drawing's gradient runs through both."""
        teacher = self.teacher
        x0 = generate(teacher, self.generator, draw.z, draw.group, self.config)
        a, s = coefficients(teacher, draw.sigma, x0)
        x_t = a * x0 + s * draw.eps
        of_assistant = teacher.ask(self.assistant, x_t, draw.sigma, draw.group).float()
        fooled = F.softplus(-self.assistant.logits).mean()
        with torch.no_grad():
            of_teacher = guided(teacher, x_t, draw.sigma, draw.group).float()
        matching, shown = matching_loss(teacher, x0, x_t, of_assistant, of_teacher, draw, self.config)
        return matching, fooled, shown


class DMD2(Rival):
    """DMD2 of the teacher, with real pictures for its critic."""

    name = "dmd2"
    needs_teacher = True

    def scheduler(self, bed: Bed) -> Any:
        return unet.student_scheduler(SIM.preset("dmd", **bed.recipe.options))

    def _run(self, bed: Bed, one: Try, count: int) -> DMD2Run:
        batch = bed.fashion.student_batch
        options = {**bed.recipe.options, "batch": batch, "steps": count, "lr": one.lr}
        options["ema_pictures"] = min(bed.fashion.options["ema_pictures"], count * batch // 10)
        teacher = unet.teacher_of(bed.teacher, batch)
        return DMD2Run(bed, teacher, SIM.preset("dmd", **options), one.folder, one.seed)

    def prepare(self, bed: Bed, root: Path, seed: int, deadline: Deadline) -> bool:
        """Measure how many turns fit into a second."""
        one = Try(root / "run", seed, bed.recipe.rates[self.name][0], 1.0)
        turns.planned(
            root / "turns.json", 1.0, lambda folder: self._run(bed, replace(one, folder=folder), 1_000_000),
            bed.recipe.turns,
        )  # fmt: skip
        return True

    def prepared(self, root: Path) -> float:
        return turns.WARM_SECONDS + turns.MEASURED_SECONDS if self._rate(root) else 0.0

    def _rate(self, root: Path) -> float:
        return float(json.loads((root / "turns.json").read_text(encoding="utf-8"))["turns_a_second"])

    def train(self, bed: Bed, one: Try, deadline: Deadline) -> bool:
        count = one.turns or max(1, int(self._rate(one.folder.parent) * one.seconds))
        return self._run(bed, one, count).run(deadline)

    def load(self, bed: Bed, one: Try) -> nn.Module | None:
        if not (one.folder / FILE).is_file():
            return None
        network, weights = UNet2DModel(**bed.fashion.unet), load_file(one.folder / FILE)
        network.load_state_dict({name: weights[f"average.{name}"] for name, _ in network.named_parameters()})
        return network.to(bed.device).eval()

    def spent(self, one: Try) -> dict[str, float]:
        if not (one.folder / FILE).is_file():
            return {"seconds": 0.0, "turns": 0}
        with safe_open(one.folder / FILE, framework="pt") as opened:
            state = json.loads(opened.metadata()["state"])
        return {"seconds": state["seconds"], "turns": state["step"]}

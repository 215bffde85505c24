"""What every rival is given: the same pictures, network, judge, noise and clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.training.checkpoint import averages
from diffaccel.training.loop import Deadline, TrainingPlan, TrainingRun
from diffaccel.training.steps import computing
from scripts.rivals.recipe import RivalRecipe
from scripts.zoo.emoji.export import training_state
from scripts.zoo.fashion import unet
from scripts.zoo.fashion.data import CLASSES, Pictures, padded
from scripts.zoo.fashion.recipe import FashionRecipe


@dataclass(frozen=True)
class Try:
    """One run of a rival: where, from which random numbers, how fast it learns and for how long.

    Attributes:
        turns: number of them, of a method that learns by turns.
    """

    folder: Path
    seed: int
    lr: float
    seconds: float
    turns: int = 0


@dataclass
class Bed:
    """The pictures, the sizes and the machine of one call."""

    fashion: FashionRecipe
    recipe: RivalRecipe
    data: Pictures
    work: Path
    dtype: torch.dtype
    tell: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        return self.data.images.device

    @cached_property
    def teacher(self) -> UNet2DModel:
        """The averaged teacher of the work folder."""
        network = unet.load(self.work, self.fashion, self.device)
        if network is None or not (self.work / "teacher.finished").exists():
            raise DiffAccelError(
                f"'{self.work}' has no finished teacher. Make it: python -m scripts.zoo.fashion.job --stages "
                "classifier,teacher --last, with the same --work."
            )
        return network

    @cached_property
    def places(self) -> Tensor:
        """Numbers of the pictures of each class ``(classes, n)``, as many of all."""
        of_class = [(self.data.labels == label).nonzero().flatten() for label in range(len(CLASSES))]
        return torch.stack([places[: min(map(len, of_class))] for places in of_class])

    def autocast(self) -> Any:
        """Return the context in which networks compute."""
        return computing(self.device, self.dtype)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return pictures ``x0 (B, 1, 32, 32)``, their labels and noise."""
        rows = torch.randint(len(self.data), (self.recipe.batch,), generator=generator, device=self.device)
        x0 = padded(self.data.images[rows])
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        return x0, self.data.labels[rows], eps

    def real(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return real pictures ``(B, 1, 32, 32)`` of labels, drawn by a generator on any device."""
        random = torch.randint(self.places.shape[1], labels.shape, generator=generator, device=generator.device)
        return padded(self.data.images[self.places[labels, random.to(self.device)]])

    def plan(self, name: str, one: Try) -> TrainingPlan:
        """Return the plan of a try; one whose length is samples keeps it."""
        known = self.recipe.plans[name]
        seconds = {} if known.samples < float("inf") else {"seconds": one.seconds}
        return replace(known, lr=one.lr, **seconds)


class Rival:
    """A method that makes a network which draws in one call, by seconds of one loss.

    Attributes:
        name: of its plan and files.
        needs_teacher: whether it begins with the teacher of the work folder.
    """

    name: str
    needs_teacher = False

    def prepare(self, bed: Bed, root: Path, seed: int, deadline: Deadline) -> bool:
        """Make what all tries share, in the folder above theirs; return whether it is finished."""
        return True

    def prepared(self, root: Path) -> float:
        """Return the seconds of that."""
        return 0.0

    def build(self, bed: Bed, seed: int) -> nn.Module:
        """Return the network that learns, as it begins."""
        return unet.build(bed.fashion, seed)

    def scheduler(self, bed: Bed) -> Any:
        """Return what draws with it, in one call."""
        return unet.own_scheduler()

    def loss_of(self, bed: Bed, network: nn.Module, one: Try) -> Callable[[torch.Generator], tuple[Tensor, int]]:
        """Return the function from a step's random numbers to its loss and its number of pictures."""
        raise NotImplementedError(f"{type(self).__name__} has no loss: rivals that learn by seconds do.")

    def train(self, bed: Bed, one: Try, deadline: Deadline) -> bool:
        """Train, or go on; return whether the run is finished."""
        network = self.build(bed, one.seed).to(bed.device)
        run = TrainingRun(
            one.folder, self.name, {"network": network}, bed.plan(self.name, one), seed=one.seed + 1,
            deadline=deadline, device=bed.device, tell=bed.tell,
        )  # fmt: skip
        loss = self.loss_of(bed, network, one)
        for _ in run:
            run.update(*loss(run.generator))
        return run.finished

    def load(self, bed: Bed, one: Try) -> nn.Module | None:
        """Return the averaged network; None where nothing was learnt."""
        file = one.folder / f"{self.name}.safetensors"
        if not file.is_file():
            return None
        network = self.build(bed, 0)
        network.load_state_dict(averages(file, "network."))
        return network.to(bed.device).eval()

    def spent(self, one: Try) -> dict[str, float]:
        """Return seconds and turns of a run."""
        state = training_state(one.folder / f"{self.name}.safetensors")
        return {"seconds": state["seconds"], "turns": state["step"]}

"""A run of distillation by matching scores: turns of an assistant and of the generator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diffaccel.distill.learner import learner
from diffaccel.distill.learning import LearningRun, decay_of
from diffaccel.distill.low_rank import begin_as, restrict
from diffaccel.distill.meter import converged
from diffaccel.distill.options import Matching
from diffaccel.distill.steps import Draw, assistant_loss, generator_step
from diffaccel.distill.teacher import Teacher
from diffaccel.errors import DiffAccelError
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.processes import Processes
from diffaccel.training.shards import shard
from diffaccel.training.steps import backward


class Distillation(LearningRun):
    """One run; :meth:`run` makes its steps.

    Args:
        begin: network that the generator begins as, such as an earlier stage's student; the teacher's by default. With
            a rank it begins as near to it as a change of the teacher of that rank comes.
        sharded: share out the weights of all three networks among the processes, instead of a copy each. The teacher
            stays as it is, and a copy of its network is shared out.
        folder, device, dtype, tell: as those of every ``LearningRun``.

    Attributes:
        generator: the network that learns to draw; :attr:`average` has what is exported.
        assistant: the network that learns the scores of what the generator draws.
    """

    config: Matching

    def __init__(
        self,
        teacher: Teacher,
        config: Matching,
        folder: str | Path,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        processes: Processes | None = None,
        begin: nn.Module | None = None,
        sharded: bool = False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        source, place = teacher, torch.device(device or next(teacher.network.parameters()).device)
        if sharded:
            if config.rank:
                raise DiffAccelError(
                    f"rank is {config.rank} and sharded is True, but a change of low rank is not shared out. Take one."
                )
            teacher = copy.copy(source)
            teacher.network = shard(copy.deepcopy(source.network), place)
        self.assistant = learner(source.network)
        if sharded:
            shard(self.assistant, place)  # one after another: each is whole for a moment
        generator = learner(source.network if begin is None or config.rank else begin)
        if sharded:
            shard(generator, place)
        if config.rank:
            restrict(generator, config.rank, seed)
            if begin is not None:
                begin_as(generator, begin)
        networks = {"generator": generator, "assistant": self.assistant}
        rates = {
            "generator": (config.lr, config.momentum),
            "assistant": (config.assistant_lr or config.lr, config.assistant_momentum),
        }
        super().__init__(
            teacher, config, folder, networks, rates, {"average": decay_of(config)}, seed=seed, device=device,
            dtype=dtype, processes=processes, begins="" if begin is None else weights_hash(begin),
            source=source if sharded else None, tell=tell,
        )  # fmt: skip

    def turn(self) -> None:
        """Make one turn: the assistant's steps, then the generator's."""
        config, random, share = self.config, self.reseed(), (self.processes.rank, self.processes.size)
        for _ in range(config.assistant_steps):
            draw = Draw.new(self.teacher, config.assistant_law, config, random, self.device, share)
            with self.autocast():
                loss = assistant_loss(self.teacher, self.generator, self.assistant, draw, config)
            backward(loss)
            self._update("assistant", self.assistant)
            self._note({"assistant": loss.detach()})
        draw = Draw.new(self.teacher, config.generator_law, config, random, self.device, share)
        with self.autocast():
            shown = generator_step(self.teacher, self.generator, self.assistant, draw, config)
        self._update("generator", self.generator)
        self.average.update()
        self._note(shown)

    def meter(self) -> dict[str, float]:
        """Return the convergence meter: where assistant and teacher agree about the drawings."""
        return converged(self)

"""Runs that train a world model and distil it, in pieces that end by a deadline and go on to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffaccel.distill.next_frame import adversary, trigflow
from diffaccel.distill.next_frame.attention import LayoutAttention
from diffaccel.distill.next_frame.consistency import LossWeight, consistency_loss, consistency_share
from diffaccel.distill.next_frame.forcing import forcing_loss, limit_frequencies, noisy_clip
from diffaccel.distill.next_frame.layouts import ClipLayout, LevelLaw, cached_layout, forcing_layout
from diffaccel.distill.next_frame.options import Sequences, WorldConsistency, WorldForcing
from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.processes import Processes
from diffaccel.training.loop import Deadline, TrainingRun, step_seed
from diffaccel.training.steps import computing


class Clips(Protocol):
    """Clips to learn from."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return frames ``(count, T, C, H, W)``, uint8 or in [-1, 1], and actions ``(count, T)`` int64."""
        ...


class Steps:
    """What the runs of both stages share: the layout of a step, its clips, and its part of the batch.

    Every random number of a step depends on (seed, step) alone: situations are drawn on the host, the rest by the run's
    generator.
    """

    def __init__(
        self, clips: Clips, options: Sequences, model: NextFrameTransformer, device: torch.device, launch: Processes
    ) -> None:
        if options.batch % launch.size:
            raise DiffAccelError(f"batch is {options.batch}, for {launch.size} processes. Take a multiple of them.")
        self.clips, self.options, self.model, self.device, self.launch = clips, options, model, device, launch
        self.null_action = model.null_action
        self._host = torch.Generator("cpu")
        self.layout = cache(self._layout)
        self.attention = cache(self._attention)

    def choose(self, seed: int, step: int, cached: float) -> int:
        """Draw the situation of a step: the length of its drafts under "cached", or 0 for "forcing"."""
        self._host.manual_seed(step_seed(seed, step))
        chance, draft = torch.rand(2, generator=self._host, dtype=torch.float64, device="cpu").tolist()
        if chance >= cached:
            return 0
        bounds = torch.tensor(self.options.drafts, dtype=torch.float64, device="cpu").cumsum(0)
        return 1 + min(int((bounds <= draft).sum()), len(bounds) - 1)

    def _layout(self, draft: int) -> ClipLayout:
        options, window = self.options, self.model.config.window
        if not draft:
            return forcing_layout(options.frames, window, self.device)
        return cached_layout(options.frames, window, options.queries, draft, self.device)

    def _attention(self, draft: int, math: bool) -> LayoutAttention:
        return LayoutAttention(self.model, self.layout(draft), "math" if math else "sdpa")

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw this process's part of the batch: frames in [-1, 1], and actions, some of them unknown."""
        rank, size = self.launch.rank, self.launch.size
        count = self.options.batch // size
        frames, actions = (x[rank * count : (rank + 1) * count] for x in self.clips.draw(count * size, generator))
        if frames.dtype == torch.uint8:
            frames = frames.float() / 127.5 - 1
        chance, share = torch.rand(2, count * size, 1, generator=generator, dtype=torch.float32, device=self.device)[
            :, rank * count : (rank + 1) * count
        ]
        place = torch.arange(actions.shape[1], dtype=torch.float32, device=self.device)
        unknown = (chance < self.options.unknown) & (place <= share * actions.shape[1])
        return frames, torch.where(unknown, self.null_action, actions)

    def autocast(self, dtype: torch.dtype) -> Any:
        """Return the context of the network's arithmetic."""
        return computing(self.device, dtype)


def train_forcing(
    model: NextFrameTransformer,
    clips: Clips,
    options: WorldForcing,
    folder: str | Path,
    *,
    seed: int = 0,
    deadline: Deadline | None = None,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    processes: Processes | None = None,
    name: str = "teacher",
    tell: Callable[[str], None] = lambda text: None,
) -> TrainingRun:
    """Train a world model by flow matching, or go on with the run in ``folder``.

    Args:
        model: on the device to train on, in fp32; it is changed in place.
        dtype: of the network's arithmetic, by autocast.
        compiled: whether the network is compiled.
        name: of checkpoint and log.
        tell: called with every entry of the log.

    Returns:
        The run; its ``ema`` has the weights to keep.
    """
    device, launch = model.device, processes or Processes()
    steps = Steps(clips, options, model, device, launch)
    limit_frequencies(model, options.fastest)
    run = TrainingRun(
        folder, name, {"transformer": model}, options.plan, seed=seed, deadline=deadline, device=device, tell=tell,
        processes=launch, settings=_settings(options, seed, dtype),
    )  # fmt: skip
    network = torch.compile(model, dynamic=False) if compiled else model
    for step in run:
        draft = steps.choose(seed, step, options.cached)
        layout = steps.layout(draft)
        frames, actions = steps.draw(run.generator)
        clip = noisy_clip(frames, actions, layout, options.law, run.generator, (launch.rank, launch.size))
        with steps.autocast(dtype):
            loss = forcing_loss(network, clip, layout, steps.attention(draft, False))  # type: ignore[arg-type]
        run.update(loss, options.batch, **{"cached" if draft else "forcing": loss.detach()})  # type: ignore[arg-type]
    return run


def train_consistency(
    student: NextFrameTransformer,
    teacher: NextFrameTransformer,
    clips: Clips,
    options: WorldConsistency,
    folder: str | Path,
    *,
    seed: int = 0,
    deadline: Deadline | None = None,
    dtype: torch.dtype = torch.float32,
    processes: Processes | None = None,
    name: str = "student",
    tell: Callable[[str], None] = lambda text: None,
) -> TrainingRun:
    """Distil a world model to few steps, or go on with the run in ``folder``; see :func:`train_forcing`.

    Args:
        student: begins as a copy of the teacher.
        teacher: frozen.
    """
    device, launch = student.device, processes or Processes()
    steps = Steps(clips, options, student, device, launch)
    modules: dict[str, nn.Module] = {"transformer": student, "weight": LossWeight().to(device)}
    if options.adversarial:
        layers = adversary.every_third(teacher.config.num_layers)
        dim = teacher.config.num_attention_heads * teacher.config.attention_head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules["heads"] = adversary.FeatureHeads(dim, layers).to(device)
    teacher.requires_grad_(False)
    student.requires_grad_(True)
    limit_frequencies(student, options.fastest)
    run = TrainingRun(
        folder, name, modules, options.plan, seed=seed, deadline=deadline, device=device, tell=tell, processes=launch,
        settings={**_settings(options, seed, dtype), "teacher": weights_hash(teacher)},
    )  # fmt: skip
    for step in run:
        draft = steps.choose(seed, step, float(options.situation == "cached"))
        loss, details = _distilling_loss(run, steps, draft, student, teacher, options, dtype)
        run.update(loss, options.batch, **details)  # type: ignore[arg-type]
    return run


def _settings(options: Sequences, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a run must have in common with its checkpoint: all but how long and how fast it goes on."""
    values = {key: value for key, value in asdict(options).items() if key != "plan"}
    return {**values, "seed": seed, "dtype": str(dtype)}


def _distilling_loss(
    run: TrainingRun,
    steps: Steps,
    draft: int,
    student: NextFrameTransformer,
    teacher: NextFrameTransformer,
    options: WorldConsistency,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one step, and its parts for the log."""
    launch, sd = steps.launch, options.sigma_data
    layout = steps.layout(draft)
    frames, actions = steps.draw(run.generator)
    law = LevelLaw(mean=options.mean, deviation=options.deviation, context=options.context, prefix=0.0, tail=0.0)
    clip = noisy_clip(frames, actions, layout, law, run.generator, (launch.rank, launch.size))
    z, t = trigflow.from_linear(clip.x, clip.sigma, sd)

    def prediction(network: NextFrameTransformer, precise: bool, z: Tensor, t: Tensor) -> Tensor:
        attend = steps.attention(draft, precise and options.tangent == "jvp")
        with steps.autocast(torch.float32 if precise else dtype):
            return trigflow.scaled_prediction(lambda x, s: network(x, s, clip.actions, layout.source, attend), z, t, sd)

    moving = ~layout.cached
    loss, value = consistency_loss(
        partial(prediction, student, False),
        partial(prediction, student, True),
        partial(prediction, teacher, False),
        z,
        t,
        moving,
        run.module["weight"],  # type: ignore[arg-type]
        r=consistency_share(clip.sigma, run.progress, options.warmup, options.anchor),
        norm=options.norm,
        kind=options.tangent,
        step=options.step,
        solver_steps=options.solver_steps,
    )
    details = {"consistency": loss.detach()}
    if options.adversarial:
        with steps.autocast(dtype):
            drawn = trigflow.clean_estimate(z, t, value)
            attend = steps.attention(draft, False)
            real, fake, persuading = _judged(run, teacher, clip.x0, drawn, clip.actions, layout, attend)
        judges = adversary.hinge(real, fake, moving.float())
        persuaded = adversary.persuasion(persuading, moving.float())
        loss = loss + options.adversarial * persuaded + judges
        details |= {"judges": judges.detach(), "persuasion": persuaded.detach()}
    return loss, details


def _judged(
    run: TrainingRun,
    teacher: NextFrameTransformer,
    real: Tensor,
    drawn: Tensor,
    actions: Tensor,
    layout: ClipLayout,
    attend: LayoutAttention,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return judgements of real and of drawn frames for the heads, and of drawn ones for the student.

    Both are noised again to one level a clip with one noise; frames of the cache are real in both.
    """
    heads: adversary.FeatureHeads = run.module["heads"]  # type: ignore[assignment]
    generator = run.generator
    level = torch.rand(len(real), 1, generator=generator, dtype=torch.float32, device=real.device)
    sigma = torch.where(layout.cached, 0.02, 0.1 + 0.8 * level)
    eps = torch.randn(real.shape, generator=generator, dtype=real.dtype, device=real.device)
    wide = trigflow.per_pixel(sigma)
    drawn = torch.where(trigflow.per_pixel(layout.cached[None]), real, drawn)

    def seen(frames: Tensor) -> list[Tensor]:
        noisy = (1 - wide) * frames + wide * eps
        return adversary.features(teacher, heads.layers, noisy, sigma, actions, layout.source, attend)

    with torch.no_grad():
        of_real = seen(real)
    of_drawn = seen(drawn)
    fake: Tensor = heads([x.detach() for x in of_drawn])
    return heads(of_real), fake, adversary.frozen_heads(heads, of_drawn)

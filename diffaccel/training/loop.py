"""Training runs: learning-rate schedule, time budget, and the resumable step loop.

    run = TrainingRun(folder, "flow", {"transformer": transformer, "t5": t5}, plan, seed=0, deadline=Deadline(540))
    for step in run:
        noise = torch.randn(shape, generator=run.generator)    # depends on (seed, step) alone
        run.update(loss(noise), samples=len(noise))

A run may be killed at any moment: the last checkpoint is complete, and the steps after it are repeated with the same
random numbers. With the optimiser's moments in the checkpoint the repetition is exact; a checkpoint saved without them
restarts with a short warm-up (``plan.restart_warmup``).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.files import remove_leftovers
from diffaccel.training.checkpoint import STATE_VERSION, check_counters, load_checkpoint, save_tensors
from diffaccel.training.ema import EMA
from diffaccel.training.steps import append_entry, average_gradients, backward, clip_or_zero, is_over_for_all


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long to train and how fast to learn.

    A run is over when ``samples`` samples were seen or ``seconds`` were spent on it, over all jobs; progress, and with
    it the learning rate, follows whichever is nearer to its end.

    Attributes:
        lr: peak learning rate.
        samples: of the whole run.
        seconds: of the whole run.
        betas: of AdamW.
        weight_decay: of matrices; vectors have none.
        clip: maximum norm of the gradient.
        warmup: steps of linear warm-up at the start.
        restart_warmup: steps of linear warm-up after a restart without the optimiser's moments.
        flat: share of the run at the full learning rate; a cosine to ``floor`` follows.
        floor: final learning rate, as a share of ``lr``.
        ema: decay of the average of weights.
        save_seconds: time between two checkpoints.
        log_seconds: time between two entries of the log.
    """

    lr: float
    samples: float = math.inf
    seconds: float = math.inf
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.02
    clip: float = 1.0
    warmup: int = 300
    restart_warmup: int = 200
    flat: float = 0.35
    floor: float = 0.01
    ema: float = 0.9995
    save_seconds: float = 60.0
    log_seconds: float = 10.0

    def __post_init__(self) -> None:
        if math.isinf(self.samples) and math.isinf(self.seconds):
            raise DiffAccelError("TrainingPlan has neither samples nor seconds: give one, or the run never ends.")
        for name, low, high in (
            ("lr", 0, math.inf), ("samples", 0, math.inf), ("seconds", 0, math.inf), ("clip", 0, math.inf),
            ("save_seconds", 0, math.inf), ("log_seconds", 0, math.inf), ("floor", 0, 1), ("ema", 0, 1),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise DiffAccelError(f"TrainingPlan.{name} is {getattr(self, name)}; it must be from {low} to {high}.")
        if not 0 <= self.flat < 1:
            raise DiffAccelError(f"TrainingPlan.flat is {self.flat}; it is the share before the decay, in [0, 1).")

    def progress(self, samples: float, seconds: float) -> float:
        """Return the share of the run that is done: 0 at the start, 1 when it is over."""
        return min(1.0, max(samples / self.samples, seconds / self.seconds))

    def rate(self, step: int, progress: float, restarted_at: int | None = None) -> float:
        """Return the learning rate of a step: warm-up times (flat, then cosine to ``floor``)."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if restarted_at is not None:
            warm = min(warm, (step - restarted_at + 1) / max(self.restart_warmup, 1))
        decay = max(0.0, progress - self.flat) / (1 - self.flat)
        return self.lr * warm * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * decay)))


class Deadline:
    """The time at which one job must end, by the monotonic clock, so that it stops before it is killed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def over(self) -> bool:
        """Return whether no time is left."""
        return self.left() <= 0


class SharingProcesses(Protocol):
    """The processes that share every step of a run, as :mod:`diffaccel.processes` tells them."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step's random numbers, so that a step that is repeated draws them again."""
    return (seed * 1_000_003 + step) % 2**63


class TrainingRun:
    """One training run: iterate over it for step numbers, and call ``update`` once in every step.

    Args:
        folder: of the checkpoint and the log; an existing checkpoint is resumed.
        name: of both files.
        modules: to train, by name.
        plan: of the run.
        seed: of the generator, which is seeded anew for every step.
        deadline: of this job.
        device: of the generator, and of the checkpoint's tensors.
        tell: called with every entry of the log as text.
        settings: JSON-ready, that a run must have in common with its checkpoint; it names those that differ.
        processes: that share every step; their gradients are averaged, the first one writes and has the clock. Modules
            must begin alike in all of them.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        modules: dict[str, nn.Module],
        plan: TrainingPlan,
        *,
        seed: int = 0,
        deadline: Deadline | None = None,
        device: str | torch.device = "cpu",
        tell: Callable[[str], None] = lambda text: None,
        settings: dict[str, Any] | None = None,
        processes: SharingProcesses | None = None,
    ) -> None:
        self.settings: dict[str, Any] | None = None if settings is None else json.loads(json.dumps(settings))
        self.rank, self.size = (0, 1) if processes is None else (processes.rank, processes.size)
        self.folder, self.name, self.plan, self.seed = Path(folder), name, plan, seed
        self.deadline, self.device, self.tell = deadline, torch.device(device), tell
        self.module = nn.ModuleDict(modules)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.generator = torch.Generator(self.device)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.restarted_at: int | None = None
        self._is_whole = True  # else the weights are of another step than the counters
        self.ema = EMA(self.module, plan.ema)
        decayed = [p for p in self.parameters if p.dim() >= 2]
        plain = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=plan.lr,
            betas=plan.betas,
            fused=self.device.type == "cuda",
        )
        self._reset_window()
        if not self.rank:
            remove_leftovers(self.folder, re.escape(self.checkpoint.name))
        if self.checkpoint.exists():
            self.load(self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        """File of the checkpoint."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.plan.progress(self.samples, self.seconds)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.progress >= 1

    def __iter__(self) -> Iterator[int]:
        """Yield steps until the run is finished or the job's time is up; save the state on the way and at the end."""
        last = saved = time.monotonic()
        self.module.train()
        try:
            while not self._is_over():
                self.generator.manual_seed(step_seed(self.seed, self.step))
                step = self.step
                yield step
                if self.step != step + 1:
                    raise DiffAccelError(f"Step {step} of '{self.name}' made no update; call update() in every step.")
                now = time.monotonic()
                self.seconds += now - last
                last = now
                if now - self._window_start >= self.plan.log_seconds:
                    self.log()
                if now - saved >= self.plan.save_seconds:
                    self.save()
                    saved = time.monotonic()
        finally:
            self.log()
            if self._is_whole:  # a step that was interrupted is made again from the checkpoint before it
                self.save()

    def _is_over(self) -> bool:
        """Return whether the run is finished or the job's time up, by the first process's clock."""
        over = self.finished or bool(self.deadline and self.deadline.over())
        return is_over_for_all(over, self.size, self.device)

    def update(self, loss: torch.Tensor, samples: int, **details: float) -> None:
        """Take one optimiser step; a gradient that is not finite is replaced by zero and logged as ``bad``.

        Args:
            loss: a scalar to differentiate.
            samples: number of samples in the losses of all processes.
            details: further values for the log.
        """
        rate = self.plan.rate(self.step, self.progress, self.restarted_at)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        backward(loss)
        average_gradients(self.parameters, self.size)
        _, finite = clip_or_zero(self.parameters, self.plan.clip)
        self._is_whole = False
        self.optimizer.step()
        self.ema.update()
        self._record({"loss": loss.detach(), "bad": (~finite).float(), **details})
        self.step += 1
        self.samples += samples
        self._window_samples += samples
        self._is_whole = True

    def _record(self, values: dict[str, torch.Tensor | float]) -> None:
        for key, value in values.items():
            total, count = self._window.get(key, (0.0, 0))
            self._window[key] = (total + value, count + 1)

    def _reset_window(self) -> None:
        self._window: dict[str, tuple[torch.Tensor | float, int]] = {}
        self._window_start, self._window_samples = time.monotonic(), 0

    def log(self) -> None:
        """Append the means since the last entry to ``<name>.jsonl``, and pass them to ``tell``."""
        if not self._window or self.rank:
            return
        seconds = max(time.monotonic() - self._window_start, 1e-9)
        means = {key: round(float(total) / count, 5) for key, (total, count) in self._window.items()}
        entry = {
            "step": self.step,
            "samples": self.samples,
            "seconds": round(self.seconds, 1),
            "progress": round(self.progress, 4),
            "per_second": round(self._window_samples / seconds, 1),
            "lr": round(self.optimizer.param_groups[0]["lr"], 7),
            **means,
        }
        append_entry(self.folder / f"{self.name}.jsonl", entry)
        self.tell(" ".join([self.name, *(f"{key}={value}" for key, value in entry.items())]))
        self._reset_window()

    def save(self, path: Path | None = None, *, moments: bool = True) -> None:
        """Write a checkpoint: weights, EMA and, with ``moments``, the optimiser's moments."""
        if self.rank:
            return
        # Parameters, not state_dict(), which repeats tied parameters under each of their names (T5's embedding).
        tensors = {f"live.{name}": parameter.detach() for name, parameter in self.module.named_parameters()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.state().items()}
        if moments:
            for index, parameter in enumerate(self.parameters):
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"moment.{index}.{key}"] = torch.as_tensor(value)
        state = {
            "version": STATE_VERSION,
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "updates": self.ema.updates,
            "restarted_at": self.restarted_at,
            **({} if self.settings is None else {"settings": self.settings}),
        }
        save_tensors(tensors, path or self.checkpoint, {"state": json.dumps(state)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Resume from a checkpoint; one without moments restarts the optimiser with a warm-up.

        Raises:
            DiffAccelError: for a file that is damaged or no checkpoint, and for one of another model or other settings.
        """
        tensors, state = load_checkpoint(path, self.device)
        keys = {"step", "samples", "seconds", "updates", "restarted_at"}
        if state.get("version") != STATE_VERSION or not keys <= state.keys():
            raise DiffAccelError(f"'{path}' is no checkpoint of version {STATE_VERSION}; remove it or start anew.")
        check_counters(path, state, {"step": None, "updates": None})
        if before := state.get("settings") if self.settings else None:
            now = self.settings or {}
            if differing := [key for key in {**now, **before} if now.get(key) != before.get(key)]:
                raise DiffAccelError(
                    f"'{path}' is of other settings ({', '.join(differing)}). Take another folder, or remove the file."
                )
        filled: dict[str, torch.Tensor] = {
            f"live.{name}": parameter for name, parameter in self.module.named_parameters()
        }
        filled |= {f"ema.{name}": shadow for name, shadow in zip(self.ema.names, self.ema.shadow, strict=True)}
        for name, target in filled.items():
            value = tensors.get(name)
            if value is None or value.shape != target.shape:
                raise DiffAccelError(f"'{path}' belongs to a model of another shape (see '{name}'); remove it.")
        for name, target in filled.items():
            target.copy_(tensors[name])
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.ema.updates, self.restarted_at = state["updates"], state["restarted_at"]
        moments = self._moments(tensors)
        for index, entry in moments.items():
            self.optimizer.state[self.parameters[index]] = entry
        if not moments and self.step:
            self.restarted_at = self.step

    def _moments(self, tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
        """Return the optimiser's state of each parameter, by its number, from a checkpoint's tensors."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("moment."):
                _, index, moment = key.split(".", 2)
                # AdamW keeps its step count on the host unless it is fused.
                moments.setdefault(int(index), {})[moment] = value if moment != "step" or self._fused else value.cpu()
        return moments

    @property
    def _fused(self) -> bool:
        return bool(self.optimizer.defaults.get("fused"))

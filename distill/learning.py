"""One run of training against a teacher: turns, averaged weights, checkpoints that resume to the bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.distill.learner import compute_dtype
from diffaccel.distill.stage import StageOptions
from diffaccel.distill.teacher import Teacher
from diffaccel.errors import DiffAccelError
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.processes import Processes
from diffaccel.training.adam import MomentumlessAdam
from diffaccel.training.checkpoint import check_counters, load_checkpoint, save_tensors
from diffaccel.training.ema import EMA
from diffaccel.training.loop import Deadline, step_seed
from diffaccel.training.shards import load_shards, local, read_state, save_shards, shared_as, whole
from diffaccel.training.steps import (
    BAD_STEPS,
    average_gradients,
    clip_or_zero,
    computing,
    is_over_for_all,
    nothing_learnt,
    write_entry,
)
from diffaccel.training.stops import StopBetweenSteps

VERSION = "2"


class LearningRun:
    """One run; :meth:`run` makes its steps, each of which is a :meth:`turn` of the networks that learn.

    Every random number depends on (seed, step) alone, so that a run that was killed repeats the steps after its last
    checkpoint to the same bits, and processes draw the parts of one batch.

    Args:
        folder: of checkpoint and log; a checkpoint there is resumed.
        networks: that learn, by name; "generator" is the one that draws.
        rates: learning rate and momentum of each.
        decays: of averages of the generator's weights, by name; "average" is what is exported.
        device: on which networks are; the teacher's by default.
        dtype: in which networks compute, by autocast, the teacher's by default; the weights that learn are float32.
        begins: hash of the weights that the generator began as, where they are not the teacher's.
        source: the teacher as it was given, where ``teacher`` has a copy of its network that is shared out.
        tell: called with every entry of the log as text.

    Attributes:
        step: number of generator steps made.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: StageOptions,
        folder: str | Path,
        networks: dict[str, nn.Module],
        rates: dict[str, tuple[float, float]],
        decays: dict[str, float],
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        processes: Processes | None = None,
        begins: str = "",
        source: Teacher | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.teacher, self.config, self.folder, self.seed = teacher, config, Path(folder), seed
        self.source, self.sharded = source or teacher, source is not None
        self.device = torch.device(device or next(self.source.network.parameters()).device)
        self.dtype, self.tell = compute_dtype(self.source.network, dtype), tell
        self.processes = processes or Processes()
        _check_shares(teacher, config, self.processes.size)
        self.networks, self.generator, self.begins = networks, networks["generator"], begins
        self.averages = {name: EMA(self.generator, decay) for name, decay in decays.items()}
        self.average = self.averages["average"]
        self.optimizers = {name: _optimizer(network, *rates[name]) for name, network in networks.items()}
        self.rates = {name: rate for name, (rate, _) in rates.items()}
        self.step, self.seconds = 0, 0.0
        self._random = torch.Generator("cpu")
        self._window: dict[str, list[Tensor]] = {}
        self._bad = {name: torch.zeros((), dtype=torch.float32, device=self.device) for name in self.optimizers}
        self._teacher = weights_hash(self.source.network)
        if (other := self._file(not self.sharded)).exists():
            raise DiffAccelError(
                f"'{other}' is of a run whose weights are {'not ' if self.sharded else ''}shared out among processes. "
                f"Go on {'without' if self.sharded else 'with'} --sharded, or take another folder."
            )
        if self.checkpoint.exists():
            self.load()

    @property
    def checkpoint(self) -> Path:
        """File of the checkpoint; where weights are shared out, one that names a folder."""
        return self._file(self.sharded)

    def _file(self, sharded: bool) -> Path:
        return self.folder / ("checkpoint.json" if sharded else "checkpoint.safetensors")

    @property
    def pictures(self) -> int:
        """Number of pictures that the generator learnt from."""
        return self.step * self.config.batch

    def run(
        self,
        deadline: Deadline | None = None,
        every: int = 0,
        evaluate: Callable[[Any], dict[str, float]] | None = None,
    ) -> bool:
        """Make the steps that are left, and return whether all are made.

        Args:
            deadline: of this process.
            every: number of steps between calls of ``evaluate`` by the first process, or by all where weights are
                shared out; the first one's numbers are logged. The averaged weights are in the generator while it
                looks. Training goes on to the same bits as without.

        A single process that is interrupted ends its step and writes a checkpoint first.

        Raises:
            DiffAccelError: where the loss stays without a finite gradient; the last good checkpoint is kept.
        """
        last = saved = logged = time.monotonic()
        with StopBetweenSteps(self.processes.size == 1) as stop:
            while self.step < self.config.steps and not stop.asked and not self._is_over(deadline):
                self.turn()
                self.step += 1
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                if now - logged >= self.config.log_seconds:
                    self._log()
                    logged = now
                looks = self.processes.rank == 0 or self.sharded  # a part of the weights is nothing to look at
                if every and self.step % every == 0 and evaluate is not None and looks:
                    with self.average:
                        values = evaluate(self)
                    self._write({"step": self.step, "pictures": self.pictures, **values})
                    last = time.monotonic()
                if now - saved >= self.config.save_seconds:
                    self.save()
                    saved = now
            self._log()
            if self._bad_steps:
                self._end_bad()
            self.save()
        return self.step >= self.config.steps

    def _is_over(self, deadline: Deadline | None) -> bool:
        """Return whether the first process's time is up: the others, which wait for it at every step, stop with it."""
        return deadline is not None and is_over_for_all(deadline.over(), self.processes.size, self.device)

    def turn(self) -> None:
        """Make one turn, of random numbers that depend on seed and step alone."""
        raise NotImplementedError(f"{type(self).__name__} makes no turns: subclasses of LearningRun do.")

    def meter(self) -> dict[str, float]:
        """Return numbers that tell how far the run is from its end, of fixed noise."""
        raise NotImplementedError(f"{type(self).__name__} has no meter: subclasses of LearningRun do.")

    def reseed(self) -> torch.Generator:
        """Return the generator of this step's random numbers, on the CPU."""
        self._random.manual_seed(step_seed(self.seed, self.step))
        return self._random

    def autocast(self) -> Any:
        """Return the context in which networks compute in the run's dtype."""
        return computing(self.device, self.dtype)

    def _update(self, name: str, network: nn.Module) -> None:
        """Step one optimiser; a gradient that is not finite is replaced by zero and counted."""
        parameters = [p for p in network.parameters() if p.grad is not None]
        if not self.sharded:  # else they are averaged as they are shared out
            average_gradients(parameters, self.processes.size)
        norm, finite = clip_or_zero(parameters, self.config.clip)
        optimizer = self.optimizers[name]
        optimizer.param_groups[0]["lr"] = self.rates[name] * self._rate()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bad = self._bad[name]
        self._bad[name] = torch.where(finite, torch.zeros_like(bad), bad + 1)
        self._note({f"{name}_norm": norm})

    def _rate(self) -> float:
        """Return the share of the learning rate at this step: constant, then falling linearly to ``floor``."""
        config = self.config
        rest = max(0.0, self.step / config.steps - config.flat) / (1 - config.flat)
        return 1 - (1 - config.floor) * rest

    def _note(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self._window.setdefault(key, []).append(value)

    def _log(self) -> None:
        """Append the means since the last entry to ``log.jsonl``, and raise where nothing finite came for long."""
        if not self._window:
            return
        means = {key: round(float(torch.stack(values).mean()), 6) for key, values in self._window.items()}
        self._window = {}
        self._write({"step": self.step, "pictures": self.pictures, "seconds": round(self.seconds, 1), **means})
        if self._bad_steps >= BAD_STEPS:
            self._end_bad()

    @property
    def _bad_steps(self) -> int:
        """Number of steps in a row, until now, in which one of the networks had no finite gradient."""
        return int(max(float(bad) for bad in self._bad.values()))

    def _end_bad(self) -> None:
        """Raise because nothing is learnt any more."""
        raise nothing_learnt(self._bad_steps, self.checkpoint, "a smaller lr, or another c")

    def _write(self, entry: dict[str, Any]) -> None:
        if self.processes.rank == 0:
            write_entry(self.folder, entry, self.tell)

    def save(self) -> None:
        """Write a checkpoint, atomically: networks, averages, the optimisers' moments, the counters."""
        if self._bad_steps or (self.processes.rank and not self.sharded):
            return  # a state that may be spoilt is not kept
        tensors = self._tensors()
        for name, network in self.networks.items():
            for index, p in enumerate(network.parameters()):
                for key, value in self.optimizers[name].state.get(p, {}).items():
                    value = torch.as_tensor(value)
                    tensors[f"{name}_moment.{index}.{key}"] = value if key == "step" else shared_as(value, p)
        state = {
            "version": VERSION,
            "step": self.step,
            "seconds": self.seconds,
            "updates": self.average.updates,
            "options": self._options(),
            "teacher": self._teacher,
            "call": self.teacher.identity,
            **({"begins": self.begins} if self.begins else {}),
        }
        if self.sharded:
            save_shards(tensors, self.checkpoint, state, self.processes.rank)
        else:
            save_tensors(tensors, self.checkpoint, {"state": json.dumps(state)})

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged weights of the generator, whole, by the names that the teacher's network has for them.

        Every process must ask where weights are shared out.
        """
        found = {}
        with self.average, torch.no_grad():
            for name, _ in self.source.network.named_parameters():
                module, _, leaf = name.rpartition(".")
                value = getattr(self.generator.get_submodule(module), leaf)  # a sum, where the rank is low
                found[name] = whole(value.detach()).clone()
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """Return weights and averages by their names in a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            tensors |= {f"{name}.{key}": p.detach() for key, p in network.named_parameters()}
        for name, average in self.averages.items():
            for key, live, shadow in zip(average.names, average.live, average.shadow, strict=True):
                tensors[f"{name}.{key}"] = shared_as(shadow, live)
        return tensors

    @torch.no_grad()
    def load(self) -> None:
        """Resume from the checkpoint.

        Raises:
            DiffAccelError: for a file that is damaged, and for a checkpoint of another teacher or of other options.
        """
        if self.sharded:
            self._load_shards()
            return
        tensors, state = load_checkpoint(self.checkpoint, self.device)
        if reason := self._differs(state):
            raise DiffAccelError(f"'{self.checkpoint}' is of {reason}. Take another folder, or remove the file.")
        self._check_tensors(tensors, state)
        for name, network in self.networks.items():
            for key, p in network.named_parameters():
                p.copy_(tensors[f"{name}.{key}"])
            for index, p in enumerate(network.parameters()):
                prefix = f"{name}_moment.{index}."
                moments = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
                if moments:
                    moments["step"] = moments["step"].cpu()
                    self.optimizers[name].state[p] = moments
        for name, average in self.averages.items():
            for key, shadow in zip(average.names, average.shadow, strict=True):
                shadow.copy_(tensors[f"{name}.{key}"])
        self._count_from(state)

    def _count_from(self, state: dict[str, Any]) -> None:
        check_counters(self.checkpoint, state, {"step": self.config.steps, "updates": None})
        for average in self.averages.values():
            average.updates = state["updates"]
        self.step, self.seconds = state["step"], state["seconds"]

    def _load_shards(self) -> None:
        """Resume from the checkpoint of weights that are shared out, also of another number of processes."""
        state = read_state(self.checkpoint)
        if reason := self._differs(state):
            raise DiffAccelError(f"'{self.checkpoint}' is of {reason}. Take another folder, or remove the file.")
        tensors = self._tensors()
        for name, network in self.networks.items():
            for index, p in enumerate(network.parameters()):
                moments = empty_moments(self.optimizers[name], p)
                self.optimizers[name].state[p] = moments
                for key, value in moments.items():
                    tensors[f"{name}_moment.{index}.{key}"] = value if key == "step" else shared_as(value, p)
        load_shards(tensors, self.checkpoint)
        self._count_from(state)

    def _check_tensors(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Raise for a checkpoint that lacks a weight or a moment, or has one of another shape."""
        needed = {
            f"{name}.{key}": p.shape for name, network in self.networks.items() for key, p in network.named_parameters()
        }
        for name, average in self.averages.items():
            needed |= {f"{name}.{key}": shadow.shape for key, shadow in average.state().items()}
        for name, network in self.networks.items() if state["step"] else ():
            had = {key.split(".")[1] for key in tensors if key.startswith(f"{name}_moment.")} or {"0"}
            for index, p in enumerate(network.parameters()):
                if str(index) in had:  # a weight without gradients has none
                    moments = empty_moments(self.optimizers[name], p)
                    needed |= {f"{name}_moment.{index}.{key}": value.shape for key, value in moments.items()}
        for name, shape in needed.items():
            if name not in tensors or tensors[name].shape != shape:
                raise DiffAccelError(
                    f"'{self.checkpoint}' is damaged: the weight '{name}' is missing or has another shape. Remove it "
                    "to begin anew, or take another folder."
                )

    def _differs(self, state: dict[str, Any]) -> str:
        """Return what a checkpoint is of instead of this run, in words; nothing where it is of this run."""
        described = isinstance(state.get("options"), dict) and isinstance(state.get("call"), dict)
        if state.get("version") != VERSION or not described or not {"step", "seconds", "updates"} <= state.keys():
            return "no run of distillation of this version"
        options, before = self._options(), state["options"]
        if differing := [key for key in {**options, **before} if before.get(key) != options.get(key)]:
            return f"other options ({', '.join(differing)})"
        if state.get("teacher") != self._teacher:
            return "another teacher, or of one with other weights"
        if state.get("begins", "") != self.begins:
            return "a run that began with another network"
        call = self.teacher.identity
        differing = [key for key in {**call, **state["call"]} if state["call"].get(key) != call.get(key)]
        return f"a teacher that is asked in another way ({', '.join(differing)})" if differing else ""

    def _options(self) -> dict[str, Any]:
        """Return what a run must have in common with its checkpoint."""
        values = {k: v for k, v in self.config.to_dict().items() if k not in ("save_seconds", "log_seconds")}
        return json.loads(json.dumps({**values, "seed": self.seed, "dtype": str(self.dtype)}))  # tuples are lists there


def empty_moments(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    """Return the state that an optimiser has of a parameter after its first step, to be filled."""
    if isinstance(optimizer, MomentumlessAdam):
        step = torch.zeros((), dtype=torch.int64, device="cpu")
        return {"step": step, "exp_avg_sq": torch.zeros_like(local(p.detach()))}
    step = torch.zeros((), dtype=torch.float32, device="cpu")
    return {"step": step, "exp_avg": torch.zeros_like(p.detach()), "exp_avg_sq": torch.zeros_like(p.detach())}


def decay_of(config: StageOptions) -> float:
    """Return the decay of the average of weights a step."""
    return 0.5 ** (config.batch / config.ema_pictures) if config.ema_pictures else 0.0


def _check_shares(teacher: Teacher, config: StageOptions, size: int) -> None:
    """Raise where a batch cannot be shared, or the teacher's batches of prompts are not a process's share of it."""
    if config.batch % size:
        raise DiffAccelError(f"A batch of {config.batch} cannot be shared by {size} processes. Take a multiple.")
    share = config.batch // size
    if (batch := getattr(teacher, "batch", share)) != share:
        raise DiffAccelError(
            f"The teacher has batches of {batch} prompts, each of {size} processes draws {share} "
            f"of {type(config).__name__}.batch={config.batch}. Take PipelineTeacher(batch={share})."
        )


def _optimizer(network: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    if momentum == 0:
        return MomentumlessAdam(parameters, lr)
    return torch.optim.Adam(parameters, lr, betas=(momentum, 0.999))

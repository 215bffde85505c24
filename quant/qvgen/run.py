"""A run of quantization-aware training: steps, log, and checkpoints that resume to the bit."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.flow import output
from diffaccel.processes import Processes
from diffaccel.quant.layer import QuantizedLayer
from diffaccel.quant.qvgen import store
from diffaccel.quant.qvgen.data import CleanSamples
from diffaccel.quant.qvgen.decay import RankDecay
from diffaccel.quant.qvgen.draws import FollowedModel, NoisyBatch
from diffaccel.quant.qvgen.losses import teacher_share, training_loss
from diffaccel.quant.qvgen.optimizer import QATOptimizer, grouped
from diffaccel.quant.qvgen.options import TrainedQuantization
from diffaccel.quant.qvgen.prepare import convert, prepare_qat
from diffaccel.training.loop import Deadline, step_seed
from diffaccel.training.steps import (
    BAD_STEPS,
    average_gradients,
    backward,
    clip_or_zero,
    computing,
    is_over_for_all,
    nothing_learnt,
    write_entry,
)
from diffaccel.training.stops import StopBetweenSteps


class QATRun:
    """One run; :meth:`run` makes its steps, :meth:`result` is the network with codes.

    Every random number depends on (seed, step) alone, so that a run that was killed repeats the steps after its last
    checkpoint to the same bits, and processes draw the parts of one batch.

    Args:
        model: the full-precision network that is followed; it stays as it is.
        samples: clean data with the prompts of ``model``, in its order.
        folder: of checkpoint and log; a checkpoint there is resumed.
        device: on which networks are; the model's by default.
        dtype: in which networks compute, by autocast; the weights that learn are float32.
        largest_time: the network's time of pure noise; that of its family, or 1000.
        tell: called with every entry of the log as text.

    Attributes:
        student: the network that learns.
        step: number of steps made.
    """

    def __init__(
        self,
        model: FollowedModel,
        samples: CleanSamples,
        config: TrainedQuantization,
        folder: str | Path,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        processes: Processes | None = None,
        largest_time: float | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.samples, self.config, self.seed = model, samples, config, seed
        self.folder, self.dtype, self.tell = Path(folder), dtype, tell
        self.device = torch.device(device or next(model.network.parameters()).device)
        self.processes = processes or Processes()
        self._check()
        self.largest_time = largest_time
        self.student: nn.Module = self.prepared()
        if config.checkpointing:
            _save_memory(self.student)
        self.decay = RankDecay(self.student, config.schedule)
        self.optimizer = QATOptimizer(self.student, config, fused=self.device.type == "cuda")
        self.step, self.seconds = 0, 0.0
        self._random = torch.Generator("cpu")
        self._window: dict[str, list[Tensor]] = {}
        self._bad = torch.zeros((), dtype=torch.float32, device=self.device)
        self._origin = store.Origin.of(model, samples, config, seed, dtype)
        if self.checkpoint.exists():
            self.load()

    def _check(self) -> None:
        """Raise for data and options that do not fit the model."""
        config, size = self.config, self.processes.size
        if config.batch % size:
            raise DiffAccelError(f"A batch of {config.batch} cannot be shared by {size} processes. Take a multiple.")
        share = config.batch // size
        if (batch := getattr(self.model, "batch", share)) != share:
            raise DiffAccelError(
                f"The model has batches of {batch} prompts, each of {size} processes trains on {share} of "
                f"batch={config.batch}. Take PipelineTeacher(batch={share})."
            )
        if tuple(self.samples.x0.shape[1:]) != tuple(self.model.shape):
            raise DiffAccelError(
                f"The samples are {tuple(self.samples.x0.shape[1:])}, but the model draws {tuple(self.model.shape)}. "
                "Encode them at the size of the call."
            )
        prompts = getattr(self.model, "prompts", None)
        if prompts is not None and tuple(prompts) != self.samples.prompts:
            raise DiffAccelError(
                "The model has other prompts than the samples. Give it those of the samples, in order."
            )
        if config.recipe == "dsa" and self.model.kind == "edm":
            raise DiffAccelError("recipe='dsa' knows no target of an EDM network. Take recipe='distill'.")

    def prepared(self) -> nn.Module:
        """Return the network that learns, as it is before the first step."""
        student = copy.deepcopy(self.model.network).float().eval().requires_grad_(True)
        network: nn.Module = prepare_qat(student, self.config, self.largest_time)
        return network

    def whole(self) -> nn.Module:
        """Return a copy of the student with all of its weights."""
        return copy.deepcopy(self.student)

    @property
    def checkpoint(self) -> Path:
        """File of the checkpoint."""
        return self.folder / "checkpoint.safetensors"

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.config.steps

    def run(
        self,
        deadline: Deadline | None = None,
        every: int = 0,
        evaluate: Callable[[QATRun], dict[str, float]] | None = None,
    ) -> bool:
        """Make the steps that are left, and return whether all are made.

        Args:
            deadline: of this process.
            every: number of steps between calls of ``evaluate``, whose numbers the log keeps.

        A single process that is interrupted ends its step and writes a checkpoint first.

        Raises:
            DiffAccelError: where the loss stays without a finite gradient; the last good checkpoint is kept.
        """
        last = saved = logged = time.monotonic()
        with StopBetweenSteps(self.processes.size == 1) as stop:
            while not self.finished and not stop.asked and not self._is_over(deadline):
                self.turn()
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                if now - logged >= self.config.log_seconds:
                    self._log()
                    logged = now
                if every and self.step % every == 0 and evaluate is not None:
                    self._write({"step": self.step, **evaluate(self)})
                    last = time.monotonic()
                if now - saved >= self.config.save_seconds:
                    self.save()
                    saved = now
            if self.finished:
                self._renew(self.config.steps)
            self._log()
            if float(self._bad):
                self._end_bad()
            self.save()
        return self.finished

    def _is_over(self, deadline: Deadline | None) -> bool:
        """Return whether the first process's time is up: the others, which wait for it at every step, stop with it."""
        return deadline is not None and is_over_for_all(deadline.over(), self.processes.size, self.device)

    def turn(self) -> None:
        """Make one step."""
        self._random.manual_seed(step_seed(self.seed, self.step))
        self._renew(self.step)
        share = (self.processes.rank, self.processes.size)
        batch = NoisyBatch.new(self.model, self.samples, self.config, self._random, self.device, share)
        loss = self.loss(batch)
        backward(loss)
        norm = self._update()
        self._note({"loss": loss.detach(), "norm": norm})
        self.step += 1

    def _renew(self, step: int) -> None:
        """Set gates of a step, and exchange side branches at the end of a phase."""
        if self.decay.step(step):
            self.optimizer.renew()

    def loss(self, batch: NoisyBatch) -> Tensor:
        """Return the loss of a batch, with its gradient."""
        model, config = self.model, self.config
        a, s = (part.to(self.device) for part in model.coefficients(batch.sigma))
        x_t = a * batch.x0 + s * batch.eps
        with computing(self.device, self.dtype):
            with torch.no_grad():
                followed = model.ask(model.network, x_t, batch.sigma, batch.group, batch.branch)
            student = model.ask(self.student, x_t, batch.sigma, batch.group, batch.branch)
        if config.recipe == "distill":
            return training_loss(student, followed, None, None)
        target = output(model.kind, batch.x0, batch.eps, a, s)
        share = teacher_share(1 - batch.sigma.to(self.device), config.alpha)
        return training_loss(student, followed, target, share)

    @torch.no_grad()
    def fixed_loss(self, batches: int = 4, seed: int = 1_000_003) -> float:
        """Return the mean loss over batches that are the same at every call, and are not trained on."""
        draws, total = torch.Generator("cpu").manual_seed(seed), 0.0
        for _ in range(batches):
            total += float(self.loss(NoisyBatch.new(self.model, self.samples, self.config, draws, self.device)))
        return total / batches

    def _update(self) -> Tensor:
        """Step the optimiser; a gradient that is not finite is replaced by zero and counted."""
        parameters = [p for group in grouped(self.student).values() for p in group.values() if p.grad is not None]
        average_gradients(parameters, self.processes.size)
        norm, finite = clip_or_zero(parameters, self.config.max_norm)
        self.optimizer.step(self.step)
        self._bad = torch.where(finite, torch.zeros_like(self._bad), self._bad + 1)
        return norm

    def _note(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self._window.setdefault(key, []).append(value)

    def _log(self) -> None:
        """Append the means since the last entry to ``log.jsonl``, and raise where nothing finite came for long."""
        if not self._window:
            return
        means = {key: float(torch.stack(values).mean()) for key, values in self._window.items()}
        self._window = {}
        point = self.config.schedule.at(self.step)
        place = {"step": self.step, "seconds": round(self.seconds, 1), "rank": point.rank, "gate": round(point.gate, 3)}
        self._write({**place, **{key: round(value, 8) for key, value in means.items()}})
        if float(self._bad) >= BAD_STEPS:
            self._end_bad()

    def _end_bad(self) -> None:
        raise nothing_learnt(int(self._bad), self.checkpoint, "a smaller lr or clip_lr")

    def _write(self, entry: dict[str, Any]) -> None:
        if self.processes.rank == 0:
            write_entry(self.folder, entry, self.tell)

    def save(self) -> None:
        """Write a checkpoint, atomically: weights, side branches, moments, counters."""
        if float(self._bad) or self.processes.rank:
            return  # a state that may be spoilt is not kept
        store.save(self.checkpoint, self.student, self.optimizer, self._origin, self.step, self.seconds)

    def load(self) -> None:
        """Resume from the checkpoint.

        Raises:
            DiffAccelError: for a checkpoint of another model, other data or other options.
        """
        self.step, self.seconds = store.load(self.checkpoint, self.student, self.optimizer, self._origin, self.device)
        self.decay.step(max(self.step - 1, 0))  # gates; the shapes are those of the checkpoint

    @torch.no_grad()
    def result(self, keep_rank: bool = False) -> nn.Module:
        """Return a copy of the student with codes, its other weights in the dtypes of the model's.

        Raises:
            DiffAccelError: where a side branch is left that is not meant to stay.
        """
        network: nn.Module = convert(self.whole(), keep_rank)
        own = dict(self.model.network.named_modules())
        for name, module in network.named_modules():
            original = own.get(name)
            if isinstance(module, QuantizedLayer) and original is not None:
                module.to(original.weight.dtype)
            elif original is not None:
                for key, p in module.named_parameters(recurse=False):
                    p.data = p.data.to(original.get_parameter(key).dtype)
                for key, b in module.named_buffers(recurse=False):
                    b.data = b.data.to(original.get_buffer(key).dtype)
        return network.requires_grad_(False)


def _save_memory(network: Any) -> None:
    if not hasattr(network, "enable_gradient_checkpointing"):
        raise DiffAccelError(f"{type(network).__name__} has no gradient checkpointing. Leave checkpointing=False.")
    network.train()  # diffusers checkpoints in training mode alone
    network.enable_gradient_checkpointing()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

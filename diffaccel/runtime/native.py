"""Drivers run a sampler's generator: the native loop against the real network, and a fallback inside the stock loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.config import State
from diffaccel.errors import DiffAccelError
from diffaccel.runtime.callbacks import Callback
from diffaccel.runtime.row_selection import Picked, rows_of
from diffaccel.session import Advance, Decode, Eval, Pred, Progress, Sampling, Session, Step, bcast

logger = logging.getLogger(__name__)


@dataclass
class Stats:
    """What a run cost.

    Attributes:
        nfe: predictions, one per row and noise level; a guided one counts once.
        forwards: rows that went through the network; a guided prediction counts twice.
        calls: network calls.
        seconds: wall time of the loop.
        peak_memory: bytes of device memory at the highest, 0 on a CPU.
        report: what the sampler tells of the run, JSON-ready.
    """

    nfe: int = 0
    forwards: int = 0
    calls: int = 0
    steps: int = 0
    decodes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    nfe_by_resolution: dict[str, int] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For records."""
        return asdict(self)


class Native:
    """The native loop: it owns the step counter, guidance, cache contexts, callbacks and the account.

    Args:
        session: the prepared call.
        state: keep latents in fp32 between steps, or round them to the pipeline's own dtype as the stock loop does
            (equal to it to the bit for Euler).
        max_batch: most rows in one network call; None for no limit.
        callback: called after every step with the pipeline's own contract.
        halves: whether a network call that does not fit in memory is tried again with half its rows, once a run.
    """

    def __init__(
        self,
        session: Session,
        *,
        state: State = "float32",
        max_batch: int | None = None,
        callback: Callback | None = None,
        halves: bool = False,
    ) -> None:
        self.halves = halves
        self.session = session
        self.state = state
        self.max_batch = max_batch
        self.callback = callback
        self.stats = Stats()
        self.sigma: Tensor | None = None  # of the last step
        self._own_steps = False  # the latents are the pipeline's own, stepped by its scheduler
        self._previous_x0: Tensor | None = None
        self._cache_key: object = None
        self.dtype = session.dtype  # of the pipeline's latents; in stock state it can change with the first step
        self._output_dtype: torch.dtype | None = None

    def run(self, sampling: Sampling) -> Tensor:
        """Drive a sampler to its end and return the pipeline's own latents, in its layout and dtype."""
        session = self.session
        cuda = session.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(session.device)
            torch.cuda.synchronize(session.device)
        start = time.perf_counter()
        reply: Any = None
        total = len(session.timesteps)
        with session.pipe.progress_bar(total=total) as bar:
            try:
                while True:
                    event = sampling.send(reply)
                    if isinstance(event, Step | Advance):
                        reply = self._step(event) if isinstance(event, Step) else self._advance(event)
                        if self.stats.steps <= total:
                            bar.update()
                        if getattr(session.pipe, "_interrupt", False):
                            sampling.close()
                            result = reply
                            break
                    elif isinstance(event, Progress):
                        bar.total, bar.n = event.total, event.done
                        bar.refresh()
                        reply = bool(getattr(session.pipe, "_interrupt", False))
                    elif isinstance(event, Decode):
                        reply = self._decode(event)
                    elif isinstance(event, Eval):
                        reply = self.predict([event])[0]
                    else:
                        reply = self.predict(event)
            except StopIteration as stop:
                result = stop.value
        if cuda:
            torch.cuda.synchronize(session.device)
            self.stats.peak_memory = torch.cuda.max_memory_allocated(session.device)
        self.stats.seconds, self.stats.report = time.perf_counter() - start, session.report
        return self.native_latents(result)

    # -- predictions -----------------------------------------------------------------------------------------------

    def predict(self, evals: list[Eval]) -> list[Pred]:
        """Answer a list of requests in order; those that fit together share network calls."""
        first = evals[0].at or self.session
        together = all((e.at or self.session) is first and e.branch == evals[0].branch for e in evals)
        if len(evals) > 1 and not (together and all(e.x.shape[1:] == evals[0].x.shape[1:] for e in evals)):
            return [self.predict([e])[0] for e in evals]
        session, branch = first, evals[0].branch
        rows = [rows_of(session, e) for e in evals]
        x = torch.cat([e.x for e in evals]) if len(evals) > 1 else evals[0].x
        sigma = evals[0].sigma
        if len(evals) > 1 and not (sigma.ndim == 0 and all(e.sigma.ndim == 0 and e.sigma == sigma for e in evals)):
            sigma = torch.cat([e.sigma.expand(len(e.x)) for e in evals])
        self._reset_caches((id(session), len(x), branch, tuple((e.cond, r) for e, r in zip(evals, rows, strict=True))))
        conds = [(e.cond, r) for e, r in zip(evals, rows, strict=True)]

        def ask() -> list[Tensor]:
            parts = []
            for pick, name in self._chunks(len(x), evals[0].cond):
                part_sigma = sigma if sigma.ndim == 0 else sigma[pick]
                picked = Picked(session, conds, pick, len(x))
                parts.append(self._guided(session, x[pick], part_sigma, branch, picked, name))
            return parts

        try:
            parts = ask()
        except torch.OutOfMemoryError:
            rows_together = min(len(x), self.max_batch or len(x))
            if not self.halves or rows_together < 2:
                raise
            self.halves, self.max_batch = False, rows_together // 2
            logger.warning(
                "Out of memory with %d rows in a network call: going on with %d.", rows_together, self.max_batch
            )
            torch.cuda.empty_cache()
            parts = ask()
        v = torch.cat(parts) if len(parts) > 1 else parts[0]
        self._count(session, len(x))
        lengths = [len(e.x) for e in evals]
        preds = []
        for e, part in zip(evals, v.split(lengths), strict=True):
            preds.append(Pred(session.path, e.x, bcast(e.sigma, e.x), part))
        return preds

    def _guided(self, session: Session, x: Tensor, sigma: Tensor, branch: str, picked: Picked, name: str) -> Tensor:
        """The velocity of one batch of rows, guided or of one branch."""
        family, schedule = session.family, session.schedule
        bsigma = bcast(sigma, x)
        network_x = family.to_network(schedule.network_input(x, bsigma).to(family.input_dtype(session)))
        timestep = schedule.timestep(sigma)
        out = self._branches(session, network_x, timestep, sigma, branch, picked, name)
        return schedule.velocity(family.from_network(out, x), x, bsigma)

    def _branches(
        self,
        session: Session,
        x: Tensor,
        timestep: Tensor,
        sigma: Tensor | None,
        branch: str,
        picked: Picked,
        name: str,
    ) -> Tensor:
        """The network's prediction at ``x`` in its own layout, guided or of one branch."""
        family, pipe = session.family, session.pipe
        arguments = session.conds[picked.first].arguments
        scale = family.guidance_scale(pipe, arguments, timestep) if branch == "guided" else None

        def ask(x: Tensor, which: str, label: str) -> Tensor:
            return self._upcast(self._network(session, x, timestep, sigma, picked.kwargs(which), label + name))

        if branch == "negative" and session.conds[picked.first].negative is None:
            raise DiffAccelError(
                "The negative branch was asked of a call without guidance. "
                "Call the pipeline with a guidance scale above 1 (and a negative prompt where the family needs one)."
            )
        if scale is None:
            return ask(x, "negative", "uncond") if branch == "negative" else ask(x, "positive", "cond")
        if family.joint_branches:
            negative, positive = family.branches(ask(torch.cat([x] * 2), "joint", "cond_uncond"))
        else:
            positive = ask(x, "positive", "cond")
            negative = ask(x, "negative", "uncond")
        return family.combine(pipe, negative, positive, scale)

    def _network(
        self, session: Session, x: Tensor, timestep: Tensor, sigma: Tensor | None, kwargs: dict[str, Any], name: str
    ) -> Tensor:
        family = session.family
        denoiser = family.network(session.pipe, timestep)
        if timestep.ndim and len(timestep) < len(x):
            timestep = torch.cat([timestep] * 2)  # both branches of a joint call
        time_arg = family.time(session.pipe, timestep, x, self.dtype)
        context: Any = contextlib.nullcontext()
        if hasattr(denoiser, "cache_context"):
            context = denoiser.cache_context(
                name,
                step_index=self.stats.steps,
                num_inference_steps=len(session.timesteps),
                sigma=sigma,
                timestep=timestep,
            )
        with context:
            out = denoiser(**{family.latent_arg: x, family.time_arg: time_arg, **kwargs, "return_dict": False})[0]
        self.stats.calls += 1
        self.stats.forwards += len(x)
        prediction = family.prediction(out, x)
        self._output_dtype = prediction.dtype
        return prediction

    def _upcast(self, out: Tensor) -> Tensor:
        return out if self.state == "stock" else out.to(torch.promote_types(out.dtype, torch.float32))

    def _reset_caches(self, key: object) -> None:
        """Stateful caches hold one trajectory at one shape: forget it when another begins."""
        if key != self._cache_key and self._cache_key is not None:
            for denoiser in self.session.family.networks(self.session.pipe).values():
                if hasattr(denoiser, "_reset_stateful_cache"):
                    denoiser._reset_stateful_cache()
        self._cache_key = key

    def _chunks(self, rows: int, cond: int) -> list[tuple[slice, str]]:
        """Rows of each network call, and what its cache context is called beside the branch."""
        size = self.max_batch or rows
        whole = rows <= size and cond == 0
        return [
            (slice(begin, begin + size), "" if whole else f"/{cond}.{chunk}")
            for chunk, begin in enumerate(range(0, rows, size))
        ]

    def _count(self, session: Session, rows: int) -> None:
        key = f"{session.height}x{session.width}"
        self.stats.nfe += rows
        self.stats.nfe_by_resolution[key] = self.stats.nfe_by_resolution.get(key, 0) + rows

    # -- the other events ------------------------------------------------------------------------------------------

    def _decode(self, event: Decode) -> Tensor:
        session = event.at or self.session
        self.stats.decodes += len(event.x0)
        return session.family.decode(session.pipe, event.x0, session.conds[0].arguments)

    def _advance(self, event: Advance) -> Tensor:
        """One step of the pipeline's scheduler on the guided prediction, in the pipeline's own arithmetic."""
        session, family = self.session, self.session.family
        scheduler, arguments = session.scheduler, session.conds[0].arguments
        timestep, latents = session.timesteps[event.index], event.latents
        self._own_steps = True
        x = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        x = family.unwrap(x, arguments).to(family.input_dtype(session))
        self._reset_caches((id(session), len(x)))
        place = len(scheduler.timesteps) - len(session.timesteps) + event.index
        levels = getattr(scheduler, "sigmas", ())
        sigma = levels[place] if place < len(levels) else None
        parts = []
        for pick, name in self._chunks(len(x), 0):
            picked = Picked(session, [(0, None)], pick, len(x))
            parts.append(self._branches(session, x[pick], timestep, sigma, "guided", picked, name))
        self._count(session, len(x))
        given = dict(session.step_arguments)
        if "old_pred_original_sample" in given:  # CogVideoXDPMScheduler keeps its history with the pipeline
            before = session.timesteps[event.index - 1] if event.index else None
            given |= {"old_pred_original_sample": self._previous_x0, "timestep_back": before}
        out = family.wrap(torch.cat(parts) if len(parts) > 1 else parts[0], arguments)
        stepped = scheduler.step(model_output=out, timestep=timestep, sample=latents, return_dict=False, **given)
        self._previous_x0 = stepped[1] if len(stepped) > 1 else None
        latents = stepped[0].to(session.dtype) if family.casts_latents else stepped[0]
        self.dtype = latents.dtype
        edited = self._end_step(event.index, timestep, lambda: latents)
        return latents if edited is None else edited

    def _step(self, event: Step) -> Tensor:
        session = self.session
        x, self.sigma = event.x, event.sigma
        if self.state == "stock":
            if not session.family.casts_latents:  # schedulers give their sample the dtype of the network's output
                self.dtype = self._output_dtype or self.dtype
            x = x.to(self.dtype).to(x.dtype)
        index = min(self.stats.steps, len(session.schedule.timesteps) - 1)
        edited = self._end_step(index, session.schedule.timesteps[index], lambda: self.native_latents(x))
        if edited is None:
            return x
        rows = session.family.unwrap(edited, session.conds[0].arguments)
        state = session.family.spatial(rows, session.height, session.width).to(x)
        return state * session.schedule.state_scale(event.sigma)

    def _end_step(self, index: int, timestep: Tensor, latents: Callable[[], Tensor]) -> Tensor | None:
        """Count, tell the pipeline and the user; returns latents if the callback changed them."""
        pipe = self.session.pipe
        self.stats.steps += 1
        if hasattr(pipe, "_current_timestep"):
            object.__setattr__(pipe, "_current_timestep", timestep)
        return None if self.callback is None else self.callback(self.session, index, timestep, latents)

    def native_latents(self, x: Tensor) -> Tensor:
        """The sampler's latents as the pipeline's own loop would hold them."""
        session, family = self.session, self.session.family
        if self._own_steps:
            return x
        sigma = session.sigmas[0] if self.sigma is None else self.sigma
        rows = family.to_network(session.schedule.to_pipeline(x, sigma).to(self.dtype))
        return family.wrap(rows, session.conds[0].arguments)

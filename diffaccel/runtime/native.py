"""The native driver: runs a sampler's generator against the pipeline's real network."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaccel.config import State
from diffaccel.errors import DiffAccelError, size_text
from diffaccel.runtime.batching import Batch, join, share_calls
from diffaccel.runtime.callbacks import Callback
from diffaccel.runtime.row_selection import RowSelection
from diffaccel.runtime.stats import Stats
from diffaccel.runtime.track import Track
from diffaccel.session import (
    Advance,
    Branch,
    Decode,
    Encode,
    Eval,
    Event,
    Pred,
    Progress,
    Sampling,
    Session,
    Stages,
    Step,
    bcast,
)  # fmt: skip

logger = logging.getLogger(__name__)


class Native:
    """The native driver: it owns the step counter, guidance, cache contexts, callbacks and the cost account.

    Args:
        session: the prepared call.
        state: keep latents in fp32 between steps, or round them to the pipeline's own dtype as the stock loop does
            (equal to it to the bit for Euler).
        max_batch: maximum number of rows in one network call; None for no limit.
        callback: called after every step with the pipeline's own contract.
        halves: whether a network call that does not fit in memory is tried again with half its rows, once a run.
        guidance_stop: share of the steps after which guided predictions are the conditional ones.
    """

    def __init__(
        self,
        session: Session,
        *,
        state: State = "float32",
        max_batch: int | None = None,
        callback: Callback | None = None,
        halves: bool = False,
        guidance_stop: float = 1.0,
    ) -> None:
        self.halves, self.counts_levels, self.guidance_stop = halves, halves, guidance_stop
        self.session = session
        self.state = state
        self.max_batch = max_batch
        self.callback = callback
        if callback is not None:
            callback.check(session)
        self.stats = Stats()
        self.sigma: Tensor | None = None  # noise level after the last step
        self.track = Track(session)
        self._scheduler_steps = False  # the latents are the pipeline's own, stepped by its scheduler
        self._previous_x0: Tensor | None = None
        self.denoised: Tensor | None = None  # second value of the scheduler's last step, which some pipelines decode
        self._cache_key: object = None
        self.dtype = session.dtype  # of the pipeline's latents; in stock state it can change with the first step
        self._output_dtype: torch.dtype | None = None

    def run(self, sampling: Sampling) -> Tensor:
        """Drive a sampler to its end and return the pipeline's own latents, in its layout and dtype."""
        with self.stats.timed(self.session.device):
            x = self._drive(sampling)
        self.stats.report = self.session.report
        return self.native_latents(x)

    def _drive(self, sampling: Sampling) -> Tensor:
        """Answer the sampler's events until it returns its latents, or the user interrupts it after a step."""
        pipe = self.session.pipe
        try:
            event = next(sampling)
            self._scheduler_steps = isinstance(event, Advance)
            if isinstance(event, Stages):
                self.track = Track(self.session, event.parts)
            if hasattr(pipe, "_num_timesteps"):  # a scheduler of second order has nearly two entries a step
                object.__setattr__(pipe, "_num_timesteps", len(self.timesteps))
            with pipe.progress_bar(total=len(self.timesteps)) as bar:
                while True:
                    reply = self._answer(event, bar)
                    if isinstance(event, Step | Advance) and self._is_interrupted:
                        sampling.close()
                        return self.track.at_full_size(reply, self.stats.steps)
                    event = sampling.send(reply)
        except StopIteration as stop:
            return stop.value

    @property
    def timesteps(self) -> Tensor:
        """The timestep of every step: those of the scheduler where it makes the steps, else one a noise level."""
        return self.session.timesteps if self._scheduler_steps else self.track.timesteps

    def _answer(self, event: Event, bar: Any) -> Any:
        """Return what the sampler receives for one event."""
        if isinstance(event, Step | Advance):
            latents = self._step(event) if isinstance(event, Step) else self._advance(event)
            if self.stats.steps <= len(self.timesteps):
                bar.update()
            return latents
        if isinstance(event, Progress):
            bar.total, bar.n = event.total, event.done
            bar.refresh()
            return self._is_interrupted
        if isinstance(event, Decode):
            return self._decode(event)
        if isinstance(event, Encode):
            return self._encode(event)
        if isinstance(event, Stages):
            return None
        if isinstance(event, Eval):
            return self.predict([event])[0]
        return self.predict(event)

    @property
    def _is_interrupted(self) -> bool:
        return bool(getattr(self.session.pipe, "_interrupt", False))

    # -- predictions -----------------------------------------------------------------------------------------------

    def predict(self, evals: list[Eval]) -> list[Pred]:
        """Answer a list of requests in order; those that fit together share network calls."""
        if not share_calls(self.session, evals):
            return [self.predict([request])[0] for request in evals]
        batch = join(self.session, evals)
        session, x = batch.session, batch.x
        self._reset_caches((self._stage, id(session), len(x), batch.branch, tuple(batch.conds)))
        velocities = self._velocity_in_memory(batch).split([len(request.x) for request in evals])
        self._count(session, len(x))
        return [
            Pred(session.path, request.x, bcast(request.sigma, request.x), velocity)
            for request, velocity in zip(evals, velocities, strict=True)
        ]

    def _velocity_in_memory(self, batch: Batch) -> Tensor:
        """Return :meth:`_velocity`; out of memory, go on with half the rows in a call where ``halves`` allows it."""
        try:
            return self._velocity(batch)
        except torch.OutOfMemoryError:
            rows_in_call = min(len(batch.x), self.max_batch or len(batch.x))
            if not self.halves or rows_in_call < 2:
                raise
            self.halves, self.max_batch = False, rows_in_call // 2
            logger.warning(
                "Out of memory with %d rows in a network call: going on with %d.", rows_in_call, self.max_batch
            )
            torch.cuda.empty_cache()
        return self._velocity(batch)

    def _velocity(self, batch: Batch) -> Tensor:
        """Return the velocity ``(R, C, H, W)`` of a batch, in as many network calls as ``max_batch`` asks for."""
        parts = []
        for part, suffix in self._chunks(len(batch.x), batch.conds[0][0]):
            selection = RowSelection(batch.session, batch.conds, part, len(batch.x))
            sigma = batch.sigma if batch.sigma.ndim == 0 else batch.sigma[part]
            parts.append(self._velocity_at_levels(batch.x[part], sigma, batch.branch, selection, suffix))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def _stage(self) -> int:
        """Index of the stage of the step that is being made."""
        return self.track.stage(self.stats.steps)

    def _past_guidance(self, sigma: Tensor | None) -> Tensor | bool:
        """Return whether guidance has stopped: by the step, in a search for each row by its noise level."""
        if self.guidance_stop >= 1:
            return False
        stop = math.ceil(round(self.guidance_stop * len(self.timesteps), 6))
        if not self.counts_levels or sigma is None:
            return self.stats.steps >= stop
        past = sigma <= self.session.sigmas[stop]
        return bool(past.all()) if bool(past.all() == past.any()) else past

    def _velocity_at_levels(
        self, x: Tensor, sigma: Tensor, branch: Branch, selection: RowSelection, suffix: str
    ) -> Tensor:
        """Return the velocity of rows, of which some may be past the end of guidance and others not."""
        past = self._past_guidance(sigma) if branch == "guided" else False
        if isinstance(past, bool):
            return self._velocity_of_rows(x, sigma, "positive" if past else branch, selection, suffix)
        guided, plain = (self._velocity_of_rows(x, sigma, b, selection, suffix) for b in ("guided", "positive"))
        return torch.where(past.to(x.device).reshape(-1, *[1] * (x.ndim - 1)), plain, guided)

    def _velocity_of_rows(
        self, x: Tensor, sigma: Tensor, branch: Branch, selection: RowSelection, suffix: str
    ) -> Tensor:
        session = selection.session
        family, schedule = session.family, session.schedule
        row_sigma = bcast(sigma, x)
        network_x = family.to_network(schedule.network_input(x, row_sigma).to(family.input_dtype(session)))
        output = self._prediction(network_x, schedule.timestep(sigma), sigma, branch, selection, suffix)
        return schedule.velocity(family.from_network(output, x), x, row_sigma)

    def _prediction(
        self, x: Tensor, timestep: Tensor, sigma: Tensor | None, branch: Branch, selection: RowSelection, suffix: str
    ) -> Tensor:
        """Return the network's prediction at ``x``, both in its own layout: guided, or of one branch.

        Args:
            selection: the conditioning of the rows of ``x``.
            suffix: appended to the branch's name to name the cache context.
        """
        session = selection.session
        family, pipe, cond = session.family, session.pipe, session.conds[selection.first_cond]
        scale = family.guidance_scale(pipe, cond.arguments, timestep) if branch == "guided" else None

        def predict(x: Tensor, branch: str, context: str) -> Tensor:
            kwargs = selection.kwargs(branch)
            return self._upcast(self._call_network(session, x, timestep, sigma, kwargs, context + suffix))

        if branch == "negative" and cond.negative is None:
            raise DiffAccelError(
                "The negative branch was asked of a call without guidance. "
                "Call the pipeline with a guidance scale above 1 (and a negative prompt where the family needs one)."
            )
        if scale is None:
            return predict(x, "negative", "uncond") if branch == "negative" else predict(x, "positive", "cond")
        if family.joint_branches:
            negative, positive = family.branches(predict(torch.cat([x] * 2), "joint", "cond_uncond"))
        else:
            positive = predict(x, "positive", "cond")
            negative = predict(x, "negative", "uncond")
        return family.combine(pipe, negative, positive, scale)

    def _call_network(
        self, session: Session, x: Tensor, timestep: Tensor, sigma: Tensor | None, kwargs: dict[str, Any], context: str
    ) -> Tensor:
        """Evaluate the network once as the pipeline calls it, in the cache context ``context`` where it has caches."""
        family = session.family
        denoiser = family.network(session.pipe, timestep)
        if timestep.ndim and len(timestep) < len(x):
            timestep = torch.cat([timestep] * 2)  # both branches of a joint call
        time = family.time(session.pipe, timestep, x, self.dtype)
        if session.scalar_time and not timestep.ndim:
            time = time.reshape(-1)[0]
        arguments = {family.latent_arg: x, family.time_arg: time, **kwargs, "return_dict": False}
        positional = [arguments.pop(name) for name in session.positional]
        self._show_time(timestep.max() if timestep.ndim else timestep)
        cache_context: Any = contextlib.nullcontext()
        if hasattr(denoiser, "cache_context"):
            cache_context = denoiser.cache_context(
                context,
                step_index=self.stats.steps,
                num_inference_steps=len(self.timesteps),
                sigma=sigma,
                timestep=timestep,
            )
        with cache_context:
            out = denoiser(*positional, **arguments)[0]
        self.stats.calls += 1
        self.stats.forwards += len(x)
        prediction = family.prediction(out, x)
        self._output_dtype = prediction.dtype
        return prediction

    def _upcast(self, out: Tensor) -> Tensor:
        return out if self.state == "stock" else out.to(torch.promote_types(out.dtype, torch.float32))

    def _reset_caches(self, key: object) -> None:
        """Clear stateful caches, which hold one trajectory at one shape, when another trajectory begins."""
        if key != self._cache_key and self._cache_key is not None:
            for denoiser in self.session.family.networks(self.session.pipe).values():
                if hasattr(denoiser, "_reset_stateful_cache"):
                    denoiser._reset_stateful_cache()
        self._cache_key = key

    def _chunks(self, rows: int, cond: int) -> list[tuple[slice, str]]:
        """Return the rows of each network call and the suffix that names its cache context beside the branch."""
        size = self.max_batch or rows
        is_plain = rows <= size and cond == 0
        return [
            (slice(begin, begin + size), "" if is_plain else f"/{cond}.{chunk}")
            for chunk, begin in enumerate(range(0, rows, size))
        ]

    def _count(self, session: Session, rows: int) -> None:
        size = size_text(session.height, session.width)
        self.stats.nfe += rows
        self.stats.nfe_by_resolution[size] = self.stats.nfe_by_resolution.get(size, 0) + rows

    # -- the other events ------------------------------------------------------------------------------------------

    def _decode(self, event: Decode) -> Tensor:
        session = event.at or self.session
        self.stats.decodes += len(event.x0)
        return session.family.decode(session.pipe, event.x0, session.conds[0].arguments)

    def _encode(self, event: Encode) -> Tensor:
        session = event.at or self.session
        self.stats.encodes += len(event.pixels)
        return session.family.encode(session.pipe, event.pixels)

    def _advance(self, event: Advance) -> Tensor:
        """Take one step of the pipeline's scheduler on the guided prediction, in the pipeline's own arithmetic."""
        latents = self._step_scheduler(event, self._scheduler_prediction(event))
        edited = self._end_step(event.index, self.session.timesteps[event.index], lambda: latents)
        return latents if edited is None else edited

    def _scheduler_prediction(self, event: Advance) -> Tensor:
        """Return the guided prediction at the pipeline's own latents, one row per sample."""
        session, family, scheduler = self.session, self.session.family, self.session.scheduler
        timestep, x = session.timesteps[event.index], event.latents
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, timestep)
        x = family.unwrap(x, session.conds[0].arguments).to(family.input_dtype(session))
        self._reset_caches((id(session), len(x)))
        place = len(scheduler.timesteps) - len(session.timesteps) + event.index
        levels = getattr(scheduler, "sigmas", ())
        sigma = levels[place] if place < len(levels) else None
        parts = []
        for part, suffix in self._chunks(len(x), 0):
            selection = RowSelection(session, [(0, None)], part, len(x))
            branch: Branch = "positive" if self._past_guidance(None) else "guided"
            parts.append(self._prediction(x[part], timestep, sigma, branch, selection, suffix))
        self._count(session, len(x))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _step_scheduler(self, event: Advance, prediction: Tensor) -> Tensor:
        """Return the pipeline's next latents from its scheduler."""
        session, family = self.session, self.session.family
        timestep, arguments = session.timesteps[event.index], dict(session.step_arguments)
        if "old_pred_original_sample" in arguments:  # CogVideoXDPMScheduler keeps its history with the pipeline
            previous = session.timesteps[event.index - 1] if event.index else None
            arguments |= {"old_pred_original_sample": self._previous_x0, "timestep_back": previous}
        output = family.wrap(prediction, session.conds[0].arguments)
        stepped = session.scheduler.step(
            model_output=output, timestep=timestep, sample=event.latents, return_dict=False, **arguments
        )
        self._previous_x0 = self.denoised = stepped[1] if len(stepped) > 1 else None
        latents = stepped[0].to(session.dtype) if family.casts_latents else stepped[0]
        self.dtype = latents.dtype
        return latents

    def _step(self, event: Step) -> Tensor:
        """Finish a step of the sampler and return the latents to go on with."""
        session = self.track.session(self.stats.steps)
        x, self.sigma = event.x, event.sigma
        if self.state == "stock":
            if not session.family.casts_latents:  # schedulers give their sample the dtype of the network's output
                self.dtype = self._output_dtype or self.dtype
            x = x.to(self.dtype).to(x.dtype)
        index = min(self.stats.steps, len(self.timesteps) - 1)
        edited = self._end_step(index, self.timesteps[index], lambda: self._latents_of(session, x))
        if edited is None:
            return x
        rows = session.family.unwrap(edited, session.conds[0].arguments)
        state = session.family.spatial(session.pipe, rows, session.height, session.width).to(x)
        return state * session.schedule.state_scale(event.sigma)

    def _end_step(self, index: int, timestep: Tensor, latents: Callable[[], Tensor]) -> Tensor | None:
        """Count a step and report it to pipeline and callback; return latents if the callback changed them."""
        stage = self._stage
        self.stats.steps += 1
        self._show_time(timestep)
        self._show_step_index()
        if self.callback is None:
            return None
        return self.callback(self.track.sessions, stage, index, timestep, latents)

    def _show_time(self, timestep: Tensor) -> None:
        """Set the pipeline's current timestep, which caches and hooks read while the network runs."""
        pipe = self.session.pipe
        if hasattr(pipe, "_current_timestep"):
            object.__setattr__(pipe, "_current_timestep", timestep)

    def _show_step_index(self) -> None:
        """Set the scheduler's step index to the entry of the level reached, as its own steps would."""
        session = self.session
        scheduler = session.scheduler
        if not self._scheduler_steps and hasattr(scheduler, "_step_index"):
            entry = session.schedule.entry(min(self.stats.steps, len(session.schedule.timesteps)))
            scheduler._step_index = len(scheduler.timesteps) - len(session.timesteps) + entry

    def native_latents(self, x: Tensor) -> Tensor:
        """Return the sampler's latents as the pipeline's own loop would hold them."""
        return x if self._scheduler_steps else self._latents_of(self.session, x)

    def _latents_of(self, session: Session, x: Tensor) -> Tensor:
        """Return latents of one session as its pipeline's loop would hold them."""
        family = session.family
        sigma = session.sigmas[0] if self.sigma is None else self.sigma
        rows = family.to_network(session.schedule.to_pipeline(x, sigma).to(self.dtype))
        return family.wrap(rows, session.conds[0].arguments)

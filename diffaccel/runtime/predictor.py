"""Answers to a sampler's requests for predictions, by the pipeline's real network."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import torch
from torch import Tensor

from diffaccel.config import State
from diffaccel.errors import DiffAccelError, size_text
from diffaccel.modules.network_call import NetworkCall, Tally, next_trajectory, telling
from diffaccel.runtime.batching import Batch, join, share_calls
from diffaccel.runtime.callbacks import Callback
from diffaccel.runtime.row_selection import RowSelection
from diffaccel.runtime.stats import Stats
from diffaccel.runtime.track import Track
from diffaccel.session import Branch, Eval, Pred, Session, StreamPlace, bcast

logger = logging.getLogger(__name__)


class Predictor:
    """The part of the native driver that calls the network: guidance, cache contexts, batches, the cost account.

    Args:
        session: the prepared call.
        state: keep latents in fp32 between steps, or round them to the pipeline's own dtype as the stock loop does
            (equal to it to the bit for Euler).
        max_batch: maximum number of rows in one network call; None for no limit.
        callback: called after every step with the pipeline's own contract.
        halves: whether a network call that does not fit in memory is tried again with half its rows, once a run.
        guidance_stop: share of the steps after which guided predictions are the conditional ones.
        told: names of the methods on the network that are told the step of every call.
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
        told: tuple[str, ...] = (),
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
        self._trajectory = 0
        self._place: StreamPlace | None = None
        self._tally = Tally(session.device, told)
        self.dtype = session.dtype  # of the pipeline's latents; in stock state it can change with the first step
        self._output_dtype: torch.dtype | None = None

    @property
    def timesteps(self) -> Tensor:
        """The timestep of every step: those of the scheduler where it makes the steps, else one a noise level."""
        return self.session.timesteps if self._scheduler_steps else self.track.timesteps

    @property
    def _place_in_stage(self) -> tuple[int, int]:
        """The index of the step in its stage, and the number of that stage's steps."""
        if self._place is not None:
            return self._place.step, self._place.steps
        return self.track.place(self.stats.steps) or (self.stats.steps, len(self.timesteps))

    def predict(self, evals: list[Eval]) -> list[Pred]:
        """Answer a list of requests in order; those that fit together share network calls."""
        if not share_calls(self.session, evals):
            return [self.predict([request])[0] for request in evals]
        batch = join(self.session, evals)
        session, x = batch.session, batch.x
        self._place = evals[0].place
        rows = (len(x), tuple(batch.conds)) if self._place is None else ()
        self._reset_caches((self._stage, id(session), batch.branch, rows))
        skipped = self._tally.skipped
        velocities = self._velocity_in_memory(batch).split([len(request.x) for request in evals])
        self._count(session, len(x))
        return [
            Pred(session.path, x, bcast(request.sigma, x), velocity, self._tally.skipped > skipped)
            for request, velocity, x in zip(evals, velocities, map(self._stepped, (e.x for e in evals)), strict=True)
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
        return schedule.velocity(family.from_network(output, x), self._stepped(x), row_sigma)

    def _stepped(self, x: Tensor) -> Tensor:
        """Return the latents that a step begins at: schedulers of diffusers round those in fp64 to fp32 there."""
        return x.to(torch.float32) if self.state == "stock" and x.dtype == torch.float64 else x

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
        arguments = {family.latent_arg: x, family.time_arg: time, **kwargs, **session.returns}
        positional = [arguments.pop(name) for name in session.positional]
        self._show_time(timestep.max() if timestep.ndim else timestep)
        step, steps = self._place_in_stage
        cache_context: Any = contextlib.nullcontext()
        if hasattr(denoiser, "cache_context"):
            cache_context = denoiser.cache_context(
                context, step_index=step, num_inference_steps=steps, sigma=sigma, timestep=timestep
            )
        call = NetworkCall(
            step, steps, sigma, timestep, context, self._trajectory, self._tally,
            noise_share=self._noise_share(session, sigma) if self._tally.names else None,
            spatial=lambda: family.spatial(session.pipe, x, session.height, session.width), stage=self._stage,
            stages=len(self.track.sessions),
        )  # fmt: skip
        with cache_context, telling(call), self._tally.timed():
            out = denoiser(*positional, **arguments)[0]
        self.stats.calls += 1
        self.stats.forwards += len(x)
        prediction = family.prediction(out, x)
        self._output_dtype = prediction.dtype
        return prediction

    def _noise_share(self, session: Session, sigma: Tensor | None) -> Tensor | None:
        """Return the part of noise ``sigma / (alpha + sigma)`` of a noise level, or of the step that has none."""
        if isinstance(session.read_schedule, DiffAccelError):
            return None
        schedule, step = session.read_schedule, self.stats.steps
        if sigma is None:
            if step >= len(schedule.sigmas):
                return None
            sigma = schedule.sigmas[step]
        return sigma / (schedule.path.alpha(sigma) + sigma)

    def _show_time(self, timestep: Tensor) -> None:
        """Set the pipeline's current timestep, which caches and hooks read while the network runs."""
        pipe = self.session.pipe
        if hasattr(pipe, "_current_timestep"):
            object.__setattr__(pipe, "_current_timestep", timestep)

    def _upcast(self, out: Tensor) -> Tensor:
        return out if self.state == "stock" else out.to(torch.promote_types(out.dtype, torch.float32))

    def _reset_caches(self, key: object) -> None:
        """Clear stateful caches, which hold one trajectory at one shape, when another trajectory begins."""
        key = key, 0 if self.callback is None else self.callback.replaced  # another conditioning from here on
        if key != self._cache_key:
            self._trajectory = next_trajectory()
            for denoiser in self.session.family.networks(self.session.pipe).values():
                may_be_cached = self._cache_key is not None or getattr(denoiser, "is_cache_enabled", False)
                if may_be_cached and hasattr(denoiser, "_reset_stateful_cache"):
                    denoiser._reset_stateful_cache()
        self._cache_key = key

    def _chunks(self, rows: int, cond: int) -> list[tuple[slice, str]]:
        """Return the rows of each network call and the suffix that names its cache context beside the branch."""
        size = self.max_batch or rows
        is_plain = rows <= size and cond == 0
        stream = "" if self._place is None else f"@{self._place.stream}"
        return [
            (slice(begin, begin + size), stream + ("" if is_plain else f"/{cond}.{chunk}"))
            for chunk, begin in enumerate(range(0, rows, size))
        ]

    def _count(self, session: Session, rows: int) -> None:
        size = size_text(session.height, session.width)
        self.stats.nfe += rows
        self.stats.nfe_by_resolution[size] = self.stats.nfe_by_resolution.get(size, 0) + rows

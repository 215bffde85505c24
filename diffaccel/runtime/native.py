"""The native driver: runs a sampler's generator against the pipeline's real network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import UnsupportedBySampler
from diffaccel.modules.guard import restored
from diffaccel.runtime.edited_levels import EditedLevels
from diffaccel.runtime.predictor import Predictor
from diffaccel.runtime.row_selection import RowSelection
from diffaccel.runtime.track import Track
from diffaccel.session import (
    Advance,
    Branch,
    Decode,
    Draft,
    Encode,
    Eval,
    Event,
    Lender,
    Lent,
    Progress,
    Sampling,
    Session,
    Stages,
    Step,
)  # fmt: skip


class Native(Predictor):
    """The native driver: it answers a sampler's events, owns the step counter and calls the pipeline's callback."""

    _levels: EditedLevels | None = None  # of a call with a step callback

    def run(self, sampling: Sampling) -> Tensor:
        """Drive a sampler to its end and return the pipeline's own latents, in its layout and dtype."""
        lender = self.session.lender
        take_off = (lambda: None) if lender is None else lender.take_off
        with self.stats.timed(self.session.device), restored(self.session.pipe, take_off):
            x = self._drive(sampling)
        self.stats.report = self.session.report
        self.stats.caches = self._tally.report() if self._tally.names else {}
        return self.native_latents(x)

    def _drive(self, sampling: Sampling) -> Tensor:
        """Answer the sampler's events until it returns its latents, or the user interrupts it after a step."""
        pipe = self.session.pipe
        try:
            event, latents = _send(sampling, None)
            self._scheduler_steps = isinstance(event, Advance)
            if self.callback is not None and not self._scheduler_steps:
                self._levels = EditedLevels(self.session)
            if isinstance(event, Stages):
                self.track = Track(self.session, event.parts)
            if hasattr(pipe, "_num_timesteps"):  # a scheduler of second order has nearly two entries a step
                object.__setattr__(pipe, "_num_timesteps", len(self.timesteps))
            with pipe.progress_bar(total=len(self.timesteps)) as bar:
                while event is not None:
                    reply = self._answer(event, bar)
                    if isinstance(event, Step | Advance) and self._is_interrupted:
                        sampling.close()
                        return self.track.at_full_size(reply)
                    event, latents = _send(sampling, reply)
            return latents
        finally:
            sampling.close()  # it may hold a folder, and a traceback may hold it

    def _answer(self, event: Event, bar: Any) -> Any:
        """Return what the sampler receives for one event."""
        if isinstance(event, Step | Advance):
            latents = self._step(event) if isinstance(event, Step) else self._advance(event)
            if self.stats.steps <= len(self.timesteps):
                bar.update()
            return latents
        if isinstance(event, Progress):
            bar.total, bar.n = event.total, event.done
            if event.note and hasattr(bar, "set_postfix_str"):
                bar.set_postfix_str(event.note, refresh=False)
            bar.refresh()
            if self.callback is not None and event.best is not None:
                self._show_best(event, event.best)
            return self._is_interrupted
        if isinstance(event, Decode):
            return self._decode(event)
        if isinstance(event, Encode):
            return self._encode(event)
        if isinstance(event, Stages):
            return None
        if isinstance(event, Draft):
            return self._lend(event)
        if isinstance(event, Eval):
            return self.predict([event])[0]
        return self.predict(event)

    @property
    def _is_interrupted(self) -> bool:
        return bool(getattr(self.session.pipe, "_interrupt", False))

    # -- the other events ------------------------------------------------------------------------------------------

    def _show_best(self, event: Progress, best: Callable[[], dict[str, Any] | None]) -> None:
        """Call the pipeline's callback with the best so far, at the step that the share of the budget comes to."""
        shown = best()
        if shown is None or self.callback is None:
            return
        index = min(len(self.timesteps) - 1, len(self.timesteps) * event.done // max(event.total, 1))
        rows = self.session.family.to_network(shown.pop("x0").to(self.dtype))
        latents = self.session.family.wrap(rows, self.session.conds[0].arguments)
        shown |= {"nfe": event.done, "budget": event.total}
        self.callback.show(self.session, index, self.timesteps[index], latents, shown)

    def _decode(self, event: Decode) -> Tensor:
        session = event.at or self.session
        self.stats.decodes += len(event.x0)
        return session.family.decode(session.pipe, event.x0, session.conds[0].arguments)

    def _encode(self, event: Encode) -> Tensor:
        session = event.at or self.session
        self.stats.encodes += len(event.pixels)
        return session.family.encode(session.pipe, event.pixels)

    def _lend(self, event: Draft) -> Lent:
        """Put the methods of a wish on the network; what caches kept before belongs to other rows."""
        lender: Lender | None = self.session.lender
        if lender is None:
            raise UnsupportedBySampler(
                f"The methods '{event.acceleration}' cannot be put on the network for a part of this call. Call a "
                "pipeline to which diffaccel.accelerate was applied."
            )
        lent = lender.put_on(event.acceleration)
        self._tally.names = tuple(dict.fromkeys((*self._tally.names, *lender.told)))
        self._cache_key = None
        return lent

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
        if self._levels is not None and not self.track.has_stages:
            self._levels.take(self.stats.steps)
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


def _send(sampling: Sampling, reply: Any) -> tuple[Event | None, Any]:
    """Return a sampler's next event, or None and the latents that it ends with.

    Nothing but the sampler runs here: a StopIteration of a callback, a hook or a network is not its end.
    """
    try:
        return sampling.send(reply), None
    except StopIteration as stop:
        return None, stop.value

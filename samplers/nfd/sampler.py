"""The sampler of a world model: frames one by one from actions, drafted ahead while an action is held.

A round draws N frames under the present action. Its first frame is always right; each next one is kept if the action is
still the same when it is due, and else thrown away with all after it (arXiv 2506.01380, speculative sampling). Drafts
after the first see their predecessors noisy, and not as they end: with N > 1 the video is another one than with N = 1,
drawn from nearly the same distribution and not the same. The first frame of a round, and a frame of :meth:`prepare`,
equal that of N = 1 up to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.engine import FrameEngine, FrameSettings, check_seeds
from diffaccel.models.next_frame.inputs import check_actions, check_prompt
from diffaccel.models.next_frame.levels import StepRule
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.samplers.nfd.latency import LatencyWatch
from diffaccel.samplers.nfd.policy import HeldActions, best_drafts
from diffaccel.samplers.nfd.stats import Rollout, RolloutStats

MOST_DRAFTS = 8
Action = int | Sequence[int] | Tensor


class NextFrameSampler:
    """Draws a video frame by frame from a :class:`NextFrameTransformer`.

    Args:
        model: the network, on its device.
        steps: evaluations K of a frame.
        window: frames that attention spans, the drawn one included; None for the model's own.
        draft: frames N of a round; "auto" measures the cost of each N when a video begins, and takes the one with the
            most frames a second for the share of held actions seen so far.
        context_noise: level in [0, 0.5) of the noise on frames that are looked back at; the model is told.
        shift: of the noise levels towards noise.
        rule: "euler", or "consistency" for a model distilled to it.
        capture: record CUDA graphs: a whole round is one launch, or with ``latency`` a step. None: on CUDA devices;
            True elsewhere is an error.
        latency: longest time in milliseconds from an action to its frame. Rounds then run step by step, so that
            :meth:`step` can give one up between two steps, and "auto" takes no larger N than keeps it. Where it cannot
            be met, that is logged once, and :attr:`stats` has what was measured.
        fan_out: maximum number of actions of :meth:`prepare`.
        merged: whether keys and values of a frame are written by the next round's first evaluation.
        seeds: of the noise, one for each video of the batch.

    Raises:
        DiffAccelError: for options that do not fit together or to the model.
    """

    def __init__(
        self, model: NextFrameTransformer, steps: int = 4, window: int | None = None,
        draft: int | Literal["auto"] = "auto", *, context_noise: float = 0.0, shift: float = 1.0,
        rule: StepRule = "euler", capture: bool | None = None, latency: float | None = None, fan_out: int = 0,
        merged: bool = True, seeds: Sequence[int] = (0,),
    ) -> None:  # fmt: skip
        settings = FrameSettings(
            steps=steps, window=window, context_noise=context_noise, shift=shift, rule=rule, merged=merged,
            capture=capture,
        )  # fmt: skip
        self.window = window or model.config.window
        if draft != "auto" and (isinstance(draft, bool) or not isinstance(draft, int) or draft < 1):
            raise DiffAccelError(f"draft is {draft!r}; it must be 'auto' or a whole number, 1 or more.")
        is_number = isinstance(latency, int | float) and not isinstance(latency, bool)
        if latency is not None and not (is_number and 0 < latency < math.inf):
            raise DiffAccelError(f"latency is {latency!r}; it must be a positive number of milliseconds, or None.")
        is_whole = isinstance(fan_out, int) and not isinstance(fan_out, bool)
        if not (is_whole and 0 <= fan_out <= model.null_action):
            raise DiffAccelError(
                f"fan_out is {fan_out!r}; it must be a whole number from 0 to {model.null_action}, the model's actions."
            )
        most = min(MOST_DRAFTS, self.window - 1) if draft == "auto" else draft
        self.model, self.steps, self.latency, self.fan_out = model, steps, latency, fan_out
        self.engine = FrameEngine(model, settings, most, seeds, branches=fan_out)
        self._draft, self._most, self._is_running, self._before = draft, most, False, 0
        self.step_seconds: dict[int, float] = {}  # by number of drafts, as measured for draft="auto"
        self._watch = LatencyWatch(latency, steps)
        self.stats = RolloutStats(latency_asked=latency)
        self._forget()

    def _forget(self) -> None:
        """Begin without a video."""
        self.held = HeldActions()
        self._action: Tensor | None = None  # (B, 1) of the latest frame
        self._ready: list[Tensor] = []  # drafts of the running round that are not due yet
        self._position = 0  # of the next of these in the round
        self._prepared: dict[int, Tensor] = {}
        self._is_begun = False

    @property
    def draft(self) -> int | Literal["auto"]:
        """Number of frames of a round, or "auto"."""
        return self._draft

    @draft.setter
    def draft(self, draft: int | Literal["auto"]) -> None:
        if self._is_running:
            raise DiffAccelError("draft was changed inside of a running round. Change it between two calls of step.")
        if draft != "auto" and (isinstance(draft, bool) or not isinstance(draft, int) or not 1 <= draft <= self._most):
            raise DiffAccelError(f"draft is {draft!r}; this sampler has memory for 1 to {self._most}, or 'auto'.")
        self._draft = draft

    def reset(
        self, frames: Tensor | None = None, actions: Any = None, *, seeds: Sequence[int] | None = None,
        truncate: bool = False,
    ) -> None:  # fmt: skip
        """Begin a video with given frames.

        Args:
            frames: ``(P, C, H, W)`` or ``(B, P, C, H, W)`` in [-1, 1], 1 to ``window`` of them; None for a grey one.
            actions: ``(P,)`` or ``(B, P)`` that produced them; None where they are unknown.
            seeds: of the noise from now on; None for those of the sampler.
            truncate: whether the last frames are taken of more than the window.
        """
        prompt, given = check_prompt(self.model, frames, actions, self.window, truncate)
        batch = self.engine.batch
        if prompt.shape[0] not in (1, batch):
            raise DiffAccelError(f"Got frames of {prompt.shape[0]} videos; the sampler was made with {batch} seeds.")
        if seeds is not None:
            check_seeds(seeds)
        if seeds is not None and len(seeds) != batch:
            raise DiffAccelError(f"Got {len(seeds)} seeds; the sampler was made with {batch}.")
        self._forget()
        self.engine.reset(prompt.expand(batch, -1, -1, -1, -1), given.expand(batch, -1), seeds)
        if self._draft == "auto" and not self.step_seconds:
            self.step_seconds = self._measure_steps()
            self._watch.tell_of_steps(self.step_seconds[1])
        self._begin_counts()

    def warm_up(self, poll: bool = False) -> int:
        """Record the graphs of all rounds, with ``poll`` of those that :meth:`step` polls in; return their number."""
        self._check_begun()
        kept, state = (self.stats, self._before), self.state_dict()
        counts = range(1, self._most + 1) if self._draft == "auto" else [self._draft]
        try:
            return self.engine.warm_up(counts, poll or self.latency is not None)
        finally:
            self.load_state_dict(state)
            self.stats, self._before = kept

    def step(self, action: Action, poll: Callable[[], Action] | None = None) -> Tensor:
        """Return the next frame ``(B, C, H, W)``, drawn under an action: an integer, or one for each video.

        Args:
            action: from 0 to ``num_actions - 1``.
            poll: asked between the steps of a round for the action that is wanted now. Another one than ``action``
                drops the drafts after the first; with ``latency`` the round is given up, once a frame, and drawn under
                the action wanted, which :attr:`action` tells.
        """
        self._check_begun()
        with self._timed():
            row = self._row(action)
            self._next(row, lambda: row.expand(-1, self._drafts_now()), poll)
            return self._take()

    @property
    def action(self) -> list[int]:
        """The action of the latest frame of each video."""
        if self._action is None:
            raise DiffAccelError("There is no frame yet. Call step first.")
        return self._action[:, 0].tolist()

    def prepare(self, actions: Sequence[int] | None = None) -> None:
        """Draw the next frame under several actions at once, before it is known which; :meth:`step` then takes one.

        That costs one evaluation of so many frames; the frame equals that of N = 1. Drafts that are ready are dropped.

        Args:
            actions: at most ``fan_out`` different ones; None for all that the model has.
        """
        self._check_begun()
        choices = list(range(self.model.null_action)) if actions is None else list(actions)
        if self.engine.batch > 1:
            raise DiffAccelError(f"prepare is for one video, and this sampler draws {self.engine.batch}.")
        if not 1 <= len(set(choices)) == len(choices) <= self.fan_out:
            raise DiffAccelError(
                f"prepare got {len(choices)} actions of a sampler with fan_out={self.fan_out}. Give different ones, up "
                f"to that many, or make the sampler with fan_out={max(len(choices), 1)}."
            )
        row = check_actions(choices, self.model.null_action, "actions")
        with self._timed():
            self._drop()
            self.stats.begin(len(choices))
            drawn = self.engine.draft(row, branches=True)
            self._prepared = dict(zip(choices, drawn.split(1, 1), strict=True))

    def frames(self, actions: Any, oracle: bool = False) -> Iterator[Tensor]:
        """Yield the frame ``(B, C, H, W)`` of each action ``(T,)`` or ``(B, T)``; see :meth:`rollout`."""
        self._check_begun()
        rows = check_actions(actions, self.model.null_action, "actions")
        if rows.shape[0] not in (1, self.engine.batch):
            raise DiffAccelError(f"actions are of {rows.shape[0]} videos; the sampler draws {self.engine.batch}.")
        rows = rows.expand(self.engine.batch, -1)
        self.stats.is_oracle |= oracle
        for i in range(rows.shape[1]):
            with self._timed():
                self._next(rows[:, i : i + 1], lambda i=i: self._guess(rows[:, i:], oracle), None)  # type: ignore[misc]
                frame = self._take()
            yield frame
        self._watch.tell()

    def rollout(self, actions: Any, oracle: bool = False) -> Rollout:
        """Draw a frame for each action of a recorded stream.

        Drafts guess from the present action alone, as in live play; only at the end of the list a round is shorter.

        Args:
            actions: ``(T,)`` or ``(B, T)`` integers.
            oracle: drafts know the actions to come: the upper bound of what guessing can reach.
        """
        drawn = torch.stack(list(self.frames(actions, oracle)), 1)
        with self._timed():
            self._wait()
        return Rollout(drawn, replace(self.stats, drafts=dict(self.stats.drafts)))  # the video's own counts go on

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that :meth:`load_state_dict` needs to go on exactly, drafts and prepared frames too."""
        self._check_begun()
        return {
            "engine": self.engine.state_dict(), "ready": [frame.clone() for frame in self._ready],
            "drafted": self._drafted[:, self._position :] if self._ready else None, "action": self._action,
            "repeats": self.held.repeats, "seen": self.held.seen,
            "prepared": {action: frame.clone() for action, frame in self._prepared.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a copied state.

        Raises:
            DiffAccelError: for something else than what :meth:`state_dict` returned.
        """
        if not isinstance(state, dict) or not {"engine", "ready", "drafted", "action", "repeats"} <= state.keys():
            raise DiffAccelError("The state lacks parts of a video. Pass what state_dict of such a sampler returned.")
        prepared = state.get("prepared", {})
        if len(prepared) > self.fan_out:
            raise DiffAccelError(
                f"The state has {len(prepared)} prepared frames; the sampler's fan_out is {self.fan_out}."
            )
        self._forget()
        self.engine.load_state_dict(state["engine"])
        self._ready, self._action = [frame.clone() for frame in state["ready"]], state["action"]
        self._prepared = {action: frame.clone() for action, frame in prepared.items()}
        self.held.repeats, self.held.seen = state["repeats"], state.get("seen", self.held.seen)
        self._begin_counts()
        self.stats.computed = len(self._ready) + len(self._prepared)
        if self._ready:
            self._drafted = state["drafted"]
            self.engine.put(torch.cat(self._ready, 1), self._drafted)
        elif self._prepared:
            choices = check_actions(list(prepared), self.model.null_action, "actions")
            self.engine.put(torch.cat(list(prepared.values()), 1), choices)

    def _begin_counts(self) -> None:
        self.stats, self._before = RolloutStats(latency_asked=self.latency), self.engine.evaluations
        self._is_begun = True

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _next(self, row: Tensor, guess: Callable[[], Tensor], poll: Callable[[], Action] | None) -> None:
        """Make sure that the next frame, under ``row``, is the first of those that are ready."""
        self._note(row)
        if self._prepared:
            self._choose(int(row[0, 0]))
        elif self._ready and not torch.equal(row, self._drafted[:, self._position, None]):
            self._drop()
        if not self._ready:
            self._draw(row, guess, poll)

    def _draw(self, row: Tensor, guess: Callable[[], Tensor], poll: Callable[[], Action] | None) -> None:
        """Draw a round; one that is given up is drawn again under the action that was wanted."""
        wanted = self._try(row, guess(), poll, gives_up=self.latency is not None)
        if not self._ready:
            self.stats.restarts += 1
            self._try(wanted, wanted.expand(-1, self._drafts_now()), poll, gives_up=False)

    def _try(self, row: Tensor, actions: Tensor, poll: Callable[[], Action] | None, gives_up: bool) -> Tensor:
        """Draw a round under ``actions``, of which ``row`` is the first, and return the action wanted at its end."""
        count, wanted = actions.shape[1], row

        def still_wanted(step: int) -> int:
            nonlocal wanted
            wanted = row if poll is None else self._row(poll())
            return count if torch.equal(wanted, row) else 0 if gives_up else 1

        self.stats.begin(count)
        by_steps = poll is not None or self.latency is not None
        self._is_running, graphs, start = True, self.engine.captures, time.perf_counter()
        try:
            drawn = self.engine.draft(actions, still_wanted if by_steps else None)
        finally:
            self._is_running = False
        if self.latency is not None and drawn.shape[1] and graphs == self.engine.captures:
            self._wait()
            self.stats.latency_p99 = self._watch.note(time.perf_counter() - start)
        self._ready = [drawn[:, j : j + 1] for j in range(drawn.shape[1])]
        self._drafted, self._position = actions, 0
        self.stats.discarded += count - len(self._ready)
        return wanted

    def _take(self) -> Tensor:
        """Decide on the frame that is ready, and return a copy."""
        frame = self._ready.pop(0)
        action = self._drafted[:, self._position, None]
        self.engine.keep(1, action, self._position)
        self._action, self._position = action, self._position + 1
        self.stats.accepted += 1
        return frame[:, 0].clone()

    def _choose(self, action: int) -> None:
        """Take the prepared frame of an action, or none."""
        choices = list(self._prepared)
        frame = self._prepared.get(action)
        self.stats.discarded += len(choices) - (frame is not None)
        self._prepared = {}
        if frame is not None:
            self._ready, self._position = [frame], choices.index(action)
            self._drafted = torch.tensor([choices], dtype=torch.int64, device="cpu")

    def _drop(self) -> None:
        """Throw away what was drafted and is not due."""
        self.stats.discarded += len(self._ready) + len(self._prepared)
        self._ready, self._prepared = [], {}

    def _guess(self, rows: Tensor, oracle: bool) -> Tensor:
        """Return the actions of a round's drafts, from the actions still to come: the first, or with an oracle all."""
        count = min(self._drafts_now(), rows.shape[1])
        return rows[:, :count] if oracle else rows[:, :1].expand(-1, count)

    def _drafts_now(self) -> int:
        if self._draft != "auto":
            return self._draft
        latency = None if self.latency is None else self.latency / 1000
        known = bool(self.step_seconds)  # else a state was loaded, and no video begun
        return best_drafts(self.step_seconds, self.held.repeats, self.steps, latency) if known else 1

    def _note(self, row: Tensor) -> None:
        if self._action is not None:
            self.held.note(torch.equal(row, self._action))

    def _measure_steps(self) -> dict[int, float]:
        """Return the seconds of one step for each number of drafts that is tried: 1, 2, 4, ... and the most."""
        seconds = {}
        for count in sorted({1 << k for k in range(self._most.bit_length())} | {self._most}):
            row = torch.zeros(self.engine.batch, count, dtype=torch.int64, device="cpu")
            times = []
            for _ in range(3):
                self._wait()
                start = time.perf_counter()
                self.engine.draft(row, lambda k: 0)
                self._wait()
                times.append(time.perf_counter() - start)
            seconds[count] = min(times)
        return seconds

    def _wait(self) -> None:
        if self.engine.x.is_cuda:
            torch.cuda.synchronize(self.engine.x.device)

    def _row(self, action: Action) -> Tensor:
        """Return an action as ``(B, 1)``."""
        try:
            numbers = torch.as_tensor(action, device="cpu").reshape(-1, 1)
        except (TypeError, ValueError, RuntimeError):
            raise DiffAccelError(f"action is {action!r}; it must be a whole number, or one for each video.") from None
        values = check_actions(numbers, self.model.null_action, "action")
        if values.shape[0] not in (1, self.engine.batch):
            raise DiffAccelError(f"Got {values.shape[0]} actions; the sampler draws {self.engine.batch} videos.")
        return values.expand(self.engine.batch, -1)

    def _check_begun(self) -> None:
        if not self._is_begun:
            raise DiffAccelError("There is no video yet. Call reset(frames, actions) first.")

    def _timed(self) -> _Timed:
        return _Timed(self)


class _Timed:
    """Adds the time of a block to a sampler's counts."""

    def __init__(self, sampler: NextFrameSampler) -> None:
        self.sampler = sampler

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.sampler.stats.seconds += time.perf_counter() - self.start
        self.sampler.stats.evaluations = self.sampler.engine.evaluations - self.sampler._before

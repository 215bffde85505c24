"""Rounds of next-frame diffusion on a ring of earlier frames: what a sampler decides, this computes (arXiv 2506.01380).

A round draws N frames together in a few steps. Of these the sampler keeps the first ones, whose keys and values are
written by the first evaluation of the next round ("merged"): one evaluation less than a pass of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.cache import FrameCache
from diffaccel.models.next_frame.cached import CachedAttention
from diffaccel.models.next_frame.levels import StepRule, levels, step
from diffaccel.models.next_frame.noise import CONTEXT, FrameNoise
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.modules.capture.graphs import BACKENDS, Graph

Poll = Callable[[int], int]


@dataclass(frozen=True, kw_only=True)
class FrameSettings:
    """How a frame is drawn.

    Attributes:
        steps: number K of evaluations of a frame.
        window: number of frames that attention spans, the drawn one included; None for the model's.
        context_noise: level in [0, 0.5) of the noise on frames that are looked back at, which the model is told.
        shift: of the levels towards noise; 1 for an even grid.
        rule: "euler", or "consistency" for a model that was distilled to one.
        merged: whether frames are written by the first evaluation of the next round, or by one of their own.
        capture: whether rounds are recorded as CUDA graphs; None where the model is on a CUDA device.
    """

    steps: int = 4
    window: int | None = None
    context_noise: float = 0.0
    shift: float = 1.0
    rule: StepRule = "euler"
    merged: bool = True
    capture: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "window"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | None if name == "window" else int):
                raise DiffAccelError(f"{name} is {number!r}; it must be a whole number.")
        for name, allowed in (("merged", (True, False)), ("capture", (True, False, None))):
            if not any(getattr(self, name) is value for value in allowed):
                words = " or ".join(map(repr, allowed))
                raise DiffAccelError(f"{name} is {getattr(self, name)!r}; it must be {words}.")
        if not (isinstance(self.shift, int | float) and 0 < self.shift < math.inf):
            raise DiffAccelError(f"shift is {self.shift!r}; it must be a positive number.")
        levels(self.steps, self.shift)
        if not (isinstance(self.context_noise, int | float) and 0 <= self.context_noise < 0.5):
            raise DiffAccelError(f"context_noise is {self.context_noise!r}; it must be from 0 to less than 0.5.")
        if self.window is not None and self.window < 2:
            raise DiffAccelError(f"window is {self.window}; it must be 2 (the drawn frame and one before it) or more.")
        if self.rule not in ("euler", "consistency"):
            raise DiffAccelError(f"rule is {self.rule!r}; it must be 'euler' or 'consistency'.")


def check_seeds(seeds: Any) -> None:
    """Raise for seeds that are no list of whole numbers, one for each video."""
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise DiffAccelError(f"seeds is {seeds!r}; it must be a list of whole numbers, one for each video.")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise DiffAccelError(f"seeds holds {seed!r}; a seed is a whole number from 0 to 2**63 - 1.")


class FrameEngine:
    """Memory and evaluations of the videos of one batch.

    Args:
        model: the network, in evaluation mode.
        settings: how a frame is drawn.
        most: maximum number of drafts of a round.
        seeds: of each video's noise; their number is the batch size.
        branches: maximum number of choices for one frame that are drawn together.

    Attributes:
        count: number of frames that are decided, which is the id of the next one.
        pending: number of the latest of these whose keys and values are not written yet.
        evaluations: number of network calls so far.
        captures: number of graphs recorded so far.
    """

    @torch.inference_mode(False)  # its memory is written in any mode later
    def __init__(
        self, model: NextFrameTransformer, settings: FrameSettings, most: int = 1, seeds: Sequence[int] = (0,),
        branches: int = 0,
    ) -> None:  # fmt: skip
        check_seeds(seeds)
        self.model, self.settings, self.most, self.branches = model, settings, most, branches
        self.batch, width = len(seeds), max(most, branches)
        self.window = settings.window or model.config.window
        if self.window < most + 1:
            raise DiffAccelError(
                f"window is {self.window} with {most} drafts; it must be {most + 1} or more. Draft fewer frames."
            )
        self.sigmas = levels(settings.steps, settings.shift)
        self.cache = FrameCache(model, self.batch, self.window, most, width)
        device, dtype = self.cache.device, self.cache.dtype
        self._backend = backend_for(settings.capture, device)
        self._pool = None if self._backend is None else self._backend.new_pool()
        self._graphs: dict[Hashable, Graph] = {}
        self._weights: list[int] = []
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (self.batch, width, *model.frame_shape)
        draws = settings.steps if settings.rule == "consistency" else 1
        self.x = torch.zeros(shape, dtype=precise, device=device)  # (B, N, C, H, W) frames that are being drawn
        self.context, self._context_noise = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self._noise = torch.zeros(draws, *shape, dtype=precise, device=device)
        self._draft_actions = torch.zeros(self.batch, width, dtype=torch.int64, device=device)
        self._context_actions = torch.zeros_like(self._draft_actions)
        self._clock = torch.zeros((), dtype=torch.int64, device=device)
        self.noise = FrameNoise(tuple(seeds), device)
        self.count = self.pending = self.evaluations = self.captures = 0
        self._drafted: Tensor | None = None

    @torch.no_grad()
    def reset(self, frames: Tensor, actions: Tensor, seeds: Sequence[int] | None = None) -> None:
        """Start from given frames ``(B, P, C, H, W)`` and the actions ``(B, P)`` that produced them."""
        self.cache.check(self.model, frames.shape[0])
        if seeds is not None:
            self.noise = FrameNoise(tuple(seeds), self.cache.device)
        self.cache.clear()
        if (weights := [p.data_ptr() for p in self.model.parameters()]) != self._weights:
            self._graphs.clear()  # they read the weights where these were
            self._weights = weights
        self.count, self.pending, self._drafted = 0, 0, None
        given = frames.to(self.x)
        for begin in range(0, given.shape[1], self.most):
            self.write_pending()
            end = min(begin + self.most, given.shape[1])
            self._take(given[:, begin:end], actions[:, begin:end])

    @torch.no_grad()
    def draft(self, actions: Tensor, poll: Poll | None = None, branches: bool = False) -> Tensor:
        """Draw frames together and return them, ``(B, n, C, H, W)``, in memory that the next round overwrites.

        Args:
            actions: ``(B, N)`` on the CPU, the guess for each frame; with ``branches``, choices for the next one.
            poll: called with the number of each step but the first before it; returns how many of the first frames are
                still wanted. The others are left out of the remaining steps; with 0 the round ends and none is drawn.
            branches: whether the frames are the next one under each action, which do not see each other.
        """
        n = actions.shape[1]
        most = self.branches if branches else self.most
        if not 1 <= n <= most:
            raise DiffAccelError(f"{n} drafts; the memory is for 1 to {most}. Make a sampler with more.")
        self.cache.check(self.model, actions.shape[0])
        if not self.settings.merged:
            self.write_pending()
        self._draft_actions[:, :n].copy_(actions, non_blocking=True)  # else the host waits for the round before
        self._clock.fill_(self.count)
        self._draw_noise(n, branches)
        m = self.pending
        if poll is None:
            self._launch(("round", m, n, branches), lambda: self._round(m, n, branches))
            self._note_written(m)
        else:
            for k in range(self.settings.steps):
                if k:
                    self._wait()  # else all steps were queued at once, and asked for when the first had hardly begun
                    n = min(n, poll(k))
                if n < 1:
                    return self.x[:, :0]
                self._launch_step(k, m if k == 0 else 0, n, branches)
        self._drafted = actions[:, :n]
        return self.x[:, :n]

    @torch.no_grad()
    def warm_up(self, counts: Sequence[int], by_steps: bool) -> int:
        """Record the graphs of rounds of so many frames, and of all choices, whatever they write; return their number.

        Args:
            counts: of frames of a round.
            by_steps: whether rounds may be given up between steps, so that a step is a graph.
        """
        if self._backend is None:
            return 0
        state, evaluations, captures = self.state_dict(), self.evaluations, self.captures
        kinds = [*((n, False) for n in counts), *[(self.branches, True)] * bool(self.branches)]
        try:
            for (n, branches), m in itertools.product(kinds, range(self.most + 1)):  # none: a round was given up
                self.count, self.pending = self.count - self.pending, 0
                self._take(torch.zeros_like(self.context[:, :m]), torch.zeros_like(self._context_actions[:, :m]))
                actions = torch.zeros(self.batch, n, dtype=torch.int64, device="cpu")
                poll = (lambda k, m=m: max(m, 1)) if by_steps and not branches else None
                self.draft(actions, poll, branches)
        finally:  # the video goes on, also where memory for graphs ran out
            self.load_state_dict(state)
            self.evaluations = evaluations
        return self.captures - captures

    def put(self, frames: Tensor, actions: Tensor) -> None:
        """Set drafts ``(B, n, C, H, W)`` of a round that another engine drew, and the actions that they were under."""
        self.x[:, : frames.shape[1]].copy_(frames)
        self._drafted = actions

    def keep(self, frames: int, actions: Tensor, first: int = 0) -> None:
        """Decide on frames of the last round: ``frames`` from the draft ``first`` on, drawn under these actions.

        Raises:
            DiffAccelError: for a frame that was drawn under another action.
        """
        last = first + frames
        if self._drafted is None or not torch.equal(self._drafted[:, first:last], actions):
            raise DiffAccelError("A frame was to be kept that was drawn under another action. Draw it again.")
        self._take(self.x[:, first:last], actions)

    @torch.no_grad()
    def write_pending(self) -> None:
        """Write keys and values of the decided frames by an evaluation of their own."""
        if m := self.pending:
            self._clock.fill_(self.count)
            self._launch(("write", m), lambda: self._evaluate(m, 0, 0.0, False))
            self._note_written(m)

    def _note_written(self, frames: int) -> None:
        """Count the pending frames as written; until then an evaluation that failed is made again."""
        self.cache.note(frames)
        self.pending -= frames

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that :meth:`load_state_dict` needs to go on exactly."""
        return {
            "cache": self.cache.state_dict(), "context": self.context[:, : self.pending].clone(),
            "context_actions": self._context_actions[:, : self.pending].clone(), "count": self.count,
            "pending": self.pending, "seeds": self.noise.seeds,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a copied state."""
        self.cache.load_state_dict(state["cache"])
        self.noise = FrameNoise(state["seeds"], self.cache.device)
        self.count, self.pending, self._drafted = state["count"] - state["pending"], 0, None
        self._take(state["context"], state["context_actions"])

    def _take(self, frames: Tensor, actions: Tensor) -> None:
        """Add frames to the decided ones that are written next."""
        begin, end = self.pending, self.pending + frames.shape[1]
        self.context[:, begin:end].copy_(frames)
        self._context_actions[:, begin:end].copy_(actions, non_blocking=True)
        if self.settings.context_noise:
            for j in range(begin, end):
                self.noise.fill(self._context_noise[:, j], self.count + j - begin, CONTEXT)
        self.count, self.pending = self.count + end - begin, end

    def _draw_noise(self, n: int, branches: bool) -> None:
        for draw in range(len(self._noise)):
            for j in range(1 if branches else n):
                self.noise.fill(self._noise[draw, :, j], self.count + j, draw)
            if branches:
                self._noise[draw, :, 1:n].copy_(self._noise[draw, :, :1].expand(-1, n - 1, -1, -1, -1))

    def _round(self, m: int, n: int, branches: bool) -> None:
        for k in range(self.settings.steps):
            self._step(k, m if k == 0 else 0, n, branches)

    def _launch_step(self, k: int, m: int, n: int, branches: bool) -> None:
        self._launch(("step", k, m, n, branches), lambda: self._step(k, m, n, branches))
        self._note_written(m)

    def _step(self, k: int, m: int, n: int, branches: bool) -> None:
        """Take the frames that are being drawn from one level to the next, and write ``m`` decided ones."""
        x = self.x[:, :n]
        if k == 0:
            x.copy_(self._noise[0, :, :n])
        v = self._evaluate(m, n, self.sigmas[k], branches)
        noise = self._noise[k + 1, :, :n] if k + 1 < len(self._noise) else None
        x.copy_(step(self.settings.rule, x, v, self.sigmas[k], self.sigmas[k + 1], noise))

    def _evaluate(self, m: int, n: int, sigma: float, branches: bool) -> Tensor:
        """Return the velocity of the drafts, and write the decided frames."""
        visible = torch.eye(n, dtype=torch.bool, device=self.x.device) if branches else None
        level = self.settings.context_noise
        context = self.context[:, :m]
        if level:
            context = (1 - level) * context + level * self._context_noise[:, :m]
        sigmas = [torch.full((self.batch, size), t, dtype=self.x.dtype, device=self.x.device)
                  for size, t in ((m, level), (n, sigma))]  # fmt: skip
        attend = CachedAttention(self.cache, self._clock, m, n, visible)
        frames = torch.cat([context, self.x[:, :n]], 1)
        actions = torch.cat([self._context_actions[:, :m], self._draft_actions[:, :n]], 1)
        return self.model(frames, torch.cat(sigmas, 1), actions, attend=attend)[:, m:]

    def _wait(self) -> None:
        if self.x.is_cuda:
            torch.cuda.current_stream(self.x.device).synchronize()

    def _launch(self, key: tuple[Any, ...], function: Callable[[], Any]) -> None:
        """Run a function of this object's memory, by its graph from the second time on."""
        self.evaluations += self.settings.steps if key[0] == "round" else 1
        if self._backend is None:
            function()
        elif (graph := self._graphs.get(key)) is not None:
            graph.replay()
        else:
            self._backend.warm_up(function)  # this is the run itself
            self._graphs[key] = self._backend.record(function, self._pool)[0]
            self.captures += 1


def backend_for(capture: bool | None, device: torch.device) -> Any:
    """Return what records graphs, or None.

    Raises:
        DiffAccelError: where graphs are asked for on a device that has none.
    """
    if capture is False or (capture is None and device.type not in BACKENDS):
        return None
    if device.type not in BACKENDS:
        raise DiffAccelError(
            f"capture=True records CUDA graphs, and the model is on {device}. Move it to 'cuda', or leave capture out."
        )
    return BACKENDS[device.type](device)

"""The state of a step cache: streams of network calls, what their real steps computed, and what stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.modules.network_call import NetworkCall, Tally
from diffaccel.modules.step_cache.decisions import Decision, Place
from diffaccel.modules.step_cache.forecasts import Forecast

Target = Literal["output", "residual"]


@dataclass
class Stream:
    """The calls of one guidance branch, one chunk of rows and one evaluation within a step, in their order.

    Attributes:
        decision: the stream's own.
        steps, features: the latest real steps and what was computed there.
        real_steps: all real steps.
        skipped: number of steps skipped since the last of them.
        shape: of what the blocks were given at them.
    """

    decision: Decision
    steps: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    real_steps: list[int] = field(default_factory=list)
    skipped: int = 0
    shape: torch.Size | None = None

    @property
    def memory(self) -> int:
        """Bytes of the features."""
        return sum(feature.numel() * feature.element_size() for feature in self.features)


@dataclass
class CachedCall:
    """One network call: its stream, the input of the blocks that may be skipped, and whether they are."""

    call: NetworkCall
    stream: Stream
    base: Tensor
    skips: bool


class StepCache:
    """Decides of every network call whether its blocks run, keeps what they computed and forecasts it.

    State of another trajectory is dropped; that of a run is freed when the run ends.

    Args:
        decide: makes the decision of a stream.
        forecast: the weights of a skipped step.
        look: returns the indicator of a call, from the call, ``base`` and ``before``; for decisions that need one.
        target: what is forecast: what the blocks return ("output"), or by how much that differs from what they are
            given ("residual"; float32, since the difference of two bf16 numbers is none).
    """

    def __init__(
        self, decide: Callable[[], Decision], forecast: Forecast, target: Target, look: Callable[..., Tensor] | None
    ) -> None:
        self.decide, self.forecast, self.target, self.look = decide, forecast, target, look
        self._trajectory = 0
        self._streams: dict[tuple[str, int], Stream] = {}
        self._last: dict[str, tuple[int, int]] = {}  # by context: the latest step, and which evaluation of it
        self._noted: Any = None
        self._memory = 0
        self._patterns: dict[str, set[tuple[int, int]]] = {}  # by stream: trajectory and step of the real steps

    def begin(self, call: NetworkCall, base: Tensor, before: Tensor | None = None) -> CachedCall:
        """Decide of a call.

        Args:
            base: what the blocks that may be skipped are given, ``(R, N, D)``, or a UNet's latents.
            before: the input of the first block where that is no part of them.
        """
        if call.tally is not self._noted:
            self._noted, self._memory, self._patterns = call.tally, 0, {}
            call.tally.at_end(self._end)
        if call.trajectory != self._trajectory:
            self._clear()
            self._trajectory = call.trajectory
        stream = self._stream(call)
        progress = Place(call.step, call.steps, stream.skipped, len(stream.real_steps), call.stage, call.stages)

        def look() -> Tensor:
            if self.look is None:
                raise LookupError("this decision needs an indicator, and the cache was made without one")
            return self.look(call, base, before)

        wants_real = stream.decision.is_real(progress, look)
        can_skip = len(stream.steps) >= self.forecast.needs and stream.shape == base.shape
        return CachedCall(call, stream, base, skips=not wants_real and can_skip)

    def _stream(self, call: NetworkCall) -> Stream:
        step, evaluation = self._last.get(call.context, (-1, 0))
        if call.step < step:  # an earlier step again: another trajectory in the same context
            self._streams = {key: stream for key, stream in self._streams.items() if key[0] != call.context}
        evaluation = evaluation + 1 if call.step == step else 0
        self._last[call.context] = call.step, evaluation
        key = call.context, evaluation
        if key not in self._streams:
            self._streams[key] = Stream(self.decide())
        return self._streams[key]

    def finish(self, turn: CachedCall, output: Tensor) -> None:
        """Keep what the blocks of a real step returned."""
        stream, step = turn.stream, turn.call.step
        stream.skipped = 0
        stream.real_steps.append(step)
        feature = output.detach().clone() if self.target == "output" else output.detach().float() - turn.base.float()
        if stream.shape != turn.base.shape:
            stream.steps, stream.features, stream.shape = [], [], turn.base.shape
        stream.steps = [*stream.steps, step][-self.forecast.keeps :]
        stream.features = [*stream.features, feature][-self.forecast.keeps :]
        self._memory = max(self._memory, sum(s.memory for s in self._streams.values()))

    def forecast_output(self, turn: CachedCall) -> Tensor:
        """Return what stands in for the output of the blocks at a skipped step, in the dtype of their input."""
        stream, call = turn.stream, turn.call
        stream.skipped += 1
        call.tally.skip()
        weights = self.forecast.weights(stream.steps, call.step, call.steps)
        total = turn.base.float() if self.target == "residual" else None
        for weight, feature in zip(weights, stream.features, strict=True):
            if weight == 0.0:
                continue
            if total is None:
                total = feature.float() if weight == 1.0 else feature.float() * weight
            else:
                total = torch.add(total, feature, alpha=weight)
        dtype = turn.base.dtype if self.target == "residual" else stream.features[-1].dtype
        return (torch.zeros_like(stream.features[-1]) if total is None else total).to(dtype)

    def _clear(self) -> None:
        for (context, evaluation), stream in self._streams.items():
            name = f"{context}#{evaluation}" if evaluation else context
            places = {(self._trajectory, step) for step in stream.real_steps}
            self._patterns.setdefault(name, set()).update(places)
        self._streams, self._last = {}, {}

    def _end(self, tally: Tally) -> None:
        """Note the real steps and the memory of the features, and free these."""
        self._clear()
        for name, places in self._patterns.items():  # a second network goes on where the first one stops
            tally.real_places.setdefault(name, set()).update(places)
        tally.notes["real_steps"] = {
            name: [step for _, step in sorted(places)] for name, places in tally.real_places.items()
        }
        tally.notes["history_bytes"] = tally.notes.get("history_bytes", 0) + self._memory
        self._noted, self._patterns, self._trajectory = None, {}, 0

"""What a method on a network is told about the network call that it is part of, and the count of calls it saved.

The driver opens :func:`telling` around every network call; hooks inside the network read :func:`current`. Outside of a
driven call there is nothing to read, and a method that needs it leaves the network as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_TRAJECTORIES = itertools.count(1)


@dataclass(eq=False)
class Tally:
    """How many network calls of a run a cache made whole and how many it skipped, and the time of both.

    On a CUDA device times are read from events once, at the end, so that counting drains no queue.

    Args:
        device: where the network runs.
        names: the methods on the network that are told their steps.

    Attributes:
        skipped: number of calls skipped so far.
        notes: what methods report of the run beside the counts, JSON-ready.
        real_places: by context, trajectory and step of its real calls, whichever network made them.
    """

    device: torch.device
    names: tuple[str, ...] = ()
    skipped: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    real_places: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    _endings: list[Callable[[Tally], None]] = field(default_factory=list)
    _skips: bool = False
    _spans: list[tuple[bool, Any, Any]] = field(default_factory=list)

    def skip(self) -> None:
        """Note that the call being made is a skipped one: its blocks do not run."""
        self._skips = True
        self.skipped += 1

    def at_end(self, ending: Callable[[Tally], None]) -> None:
        """Call ``ending`` when the run has ended, where a method adds its notes and frees what it keeps."""
        self._endings.append(ending)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count and time the call made in this block, where a method on the network asks for it."""
        if not self.names:
            yield
            return
        self._skips = False
        start = self._now()
        yield
        self._spans.append((self._skips, start, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def report(self) -> dict[str, Any]:
        """Return the counts and seconds of real and skipped calls; on a CUDA device its queue must have drained."""
        while self._endings:
            self._endings.pop()(self)
        seconds, calls = {False: 0.0, True: 0.0}, {False: 0, True: 0}
        for skipped, start, end in self._spans:
            calls[skipped] += 1
            seconds[skipped] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        whole = seconds[False] + seconds[True]
        return {
            "methods": list(self.names),
            "real_calls": calls[False],
            "skipped_calls": calls[True],
            "real_seconds": seconds[False],
            "skipped_seconds": seconds[True],
            "skipped_share_of_seconds": seconds[True] / whole if whole else 0.0,
            **self.notes,
        }


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One network call of a driven pipeline call.

    State that a method keeps from call to call belongs to one trajectory and one context: what it has of another
    trajectory is dropped, and contexts do not see each other's.

    Attributes:
        step, steps: the step of the sampler and their number, within the current stage.
        sigma: noise level, scalar or one per row; None where the pipeline's scheduler has none.
        timestep: the schedule's timestep, scalar or one per row.
        context: the guidance branch and the chunk of rows that the call is for.
        trajectory: a number that changes with every call of the pipeline, stage, shape and conditioning.
        tally: where a method notes that it skips the call.
        noise_share: the part of noise in the latents, ``sigma / (alpha + sigma)`` in [0, 1], a scalar or one per row;
            None where the noise levels cannot be read.
        spatial: makes the latents of this call in the layout ``(B, C, H, W)`` or ``(B, C, F, H, W)``.
        stage, stages: index of the stage and their number, of a sampler that changes the resolution.
    """

    step: int
    steps: int
    sigma: Tensor | None
    timestep: Tensor
    context: str
    trajectory: int
    tally: Tally
    noise_share: Tensor | None = None
    spatial: Callable[[], Tensor] | None = None
    stage: int = 0
    stages: int = 1


_CURRENT: ContextVar[NetworkCall | None] = ContextVar("diffaccel_network_call", default=None)
_READS: ContextVar[list[NetworkCall | None] | None] = ContextVar("diffaccel_network_call_reads", default=None)


def current() -> NetworkCall | None:
    """Return the network call that is being made, or None outside of a driven one."""
    call, reads = _CURRENT.get(), _READS.get()
    if reads is not None:
        reads.append(call)
    return call


@contextlib.contextmanager
def noting_reads() -> Iterator[list[NetworkCall | None]]:
    """Note what :func:`current` returns in this block: what reads it computes something else at another step."""
    reads: list[NetworkCall | None] = []
    token = _READS.set(reads)
    try:
        yield reads
    finally:
        _READS.reset(token)


@contextlib.contextmanager
def telling(call: NetworkCall) -> Iterator[None]:
    """Let :func:`current` return ``call`` in this block."""
    token = _CURRENT.set(call)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def next_trajectory() -> int:
    """Return a number that no trajectory of this process has had."""
    return next(_TRAJECTORIES)

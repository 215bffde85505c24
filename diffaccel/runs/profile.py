"""Profile one pipeline call: network calls and rows, time by part, initial noise, final latents.

Nothing waits for a GPU while the call runs: times are events on its stream, read when the call is over.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffaccel.families import networks
from diffaccel.modules.guard import attributes_of, restored

TEXT, NETWORK, DECODE = "text", "network", "decode"
_MOST_PICTURES = 4096  # of one call
PARTS = (TEXT, NETWORK, DECODE)
_Span = tuple[Any, Any]  # moments of a clock: start and end


@dataclass
class Profile:
    """Measurements of one pipeline call.

    Attributes:
        calls: number of network calls.
        forwards: rows that went through the network.
        seconds: of the whole call.
        parts: seconds in the text (and image) encoders, in the network, and in the VAE's decoder.
        steps: seconds of each network call, in order.
        gaps: seconds from the end of each network call to the start of the next.
        noise: the rows of the first network call.
        decoded: the decoder's latest inputs, in its own scale; empty where there is no decoder.
    """

    calls: int = 0
    forwards: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    noise: Tensor | None = None
    decoded: list[Tensor] = field(default_factory=list)

    def keep_decoded(self, latents: Tensor) -> None:
        """Keep an input of the decoder, and of earlier ones no more than a call has pictures."""
        self.decoded.append(latents)
        while sum(len(rows) for rows in self.decoded[1:]) >= _MOST_PICTURES:
            del self.decoded[0]

    def latents(self, count: int) -> Tensor | None:
        """Return the decoder's input for the ``count`` pictures of the call.

        They are the last rows decoded: some pipelines decode row by row, and some samplers decode on the way.
        """
        rows = [row for latents in self.decoded for row in latents][-count:]
        return torch.stack(rows) if len(rows) == count else None

    def noise_sha256(self, count: int) -> list[str]:
        """Hash each of the first ``count`` rows of noise to sixteen hex digits: equal noise has equal hashes."""
        if self.noise is None or len(self.noise) < count:
            return []
        rows = self.noise[:count].detach().cpu().float().contiguous()
        return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in rows]


class _Clock:
    """Moments in time on a CPU, or on a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            if self.device.type == "mps":
                torch.mps.synchronize()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


class _Hooks:
    """Hooks on the modules of one pipeline, and its watched decoder."""

    def __init__(self, profile: Profile, clock: _Clock) -> None:
        self.profile, self.clock = profile, clock
        self.handles: list[Any] = []
        self.restore_decoder: Callable[[], None] | None = None

    def remove(self) -> None:
        """Take off all that was put on, also for the second time."""
        for handle in self.handles:
            handle.remove()
        if self.restore_decoder is not None:
            self.restore_decoder()

    def count_calls(self, network: torch.nn.Module) -> None:
        """Count calls and rows of a network, and keep the rows of the first call."""
        profile = self.profile

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            profile.calls += 1
            profile.forwards += 1 if rows is None else len(rows)
            if profile.noise is None and rows is not None:
                profile.noise = rows.detach().clone()

        self.handles.append(network.register_forward_pre_hook(count, with_kwargs=True))

    def time_calls(self, module: torch.nn.Module, spans: list[_Span]) -> None:
        """Append the start and end of every call of a module to ``spans``."""
        starts: list[Any] = []

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            starts.append(self.clock.now())

        def leave(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            spans.append((starts.pop(), self.clock.now()))

        self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self.handles.append(module.register_forward_hook(leave, with_kwargs=True))

    def watch_decoder(self, pipe: Any, spans: list[_Span]) -> None:
        """Time the VAE's ``decode`` and keep its input."""
        vae: Any = getattr(pipe, "vae", None)
        decode = getattr(vae, "decode", None)
        if decode is None:
            return
        profile = self.profile

        def watched(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            start = self.clock.now()
            output = decode(latents, *args, **kwargs)
            spans.append((start, self.clock.now()))
            profile.keep_decoded(latents.detach())
            return output

        self.restore_decoder = attributes_of(vae, ["decode"])
        vae.decode = watched


@contextlib.contextmanager
def measure(pipe: Any) -> Iterator[Profile]:
    """Profile the one pipeline call made in the block; all hooks are removed at its end."""
    profile, clock = Profile(), _Clock(pipe.device)
    spans: dict[str, list[_Span]] = {part: [] for part in PARTS}
    hooks = _Hooks(profile, clock)
    with restored(pipe, hooks.remove):
        for network in networks(pipe):
            hooks.count_calls(network)
            hooks.time_calls(network, spans[NETWORK])
        for encoder in _encoders(pipe):
            hooks.time_calls(encoder, spans[TEXT])
        hooks.watch_decoder(pipe, spans[DECODE])
        start = time.perf_counter()
        yield profile
        clock.wait()
        profile.seconds = time.perf_counter() - start
        profile.parts = {part: sum(clock.between(*span) for span in spans[part]) for part in PARTS}
        profile.steps = [clock.between(*span) for span in spans[NETWORK]]
        profile.gaps = [clock.between(end, start) for (_, end), (start, _) in pairwise(spans[NETWORK])]


def _encoders(pipe: Any) -> list[torch.nn.Module]:
    names = [name for name in pipe.components if name.startswith(("text_encoder", "image_encoder"))]
    return [module for name in names if isinstance(module := getattr(pipe, name, None), torch.nn.Module)]

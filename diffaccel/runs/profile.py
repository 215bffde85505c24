"""What happens inside one pipeline call: network calls and rows, where the time goes, first noise, last latents.

Nothing waits for a GPU while the call runs: times are events on its stream, read when the call is over.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.families import networks

TEXT, NETWORK, DECODE = "text", "network", "decode"
PARTS = (TEXT, NETWORK, DECODE)


@dataclass
class Measured:
    """One call, measured.

    Attributes:
        calls: how often the network was called.
        forwards: rows that went through it.
        seconds: of the whole call.
        parts: seconds in the text (and image) encoders, in the network, and in the VAE's decoder.
        steps: seconds of each network call, in order.
        noise: the first rows that the network saw, a tensor a row.
        latents: what the decoder was given, in its own scale; None where there is no decoder.
    """

    calls: int = 0
    forwards: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    noise: Tensor | None = None
    latents: Tensor | None = None

    def noise_sha256(self, count: int) -> list[str]:
        """Sixteen hex digits for each of the first ``count`` rows: equal where two calls started from equal noise."""
        if self.noise is None or len(self.noise) < count:
            return []
        rows = self.noise[:count].detach().cpu().float().contiguous()
        return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in rows]


class _Clock:
    """Moments on a CPU, or on a GPU's stream."""

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


@contextlib.contextmanager
def measure(pipe: Any) -> Iterator[Measured]:
    """Measure the one pipeline call that is made in the block; everything is taken off again."""
    found, clock = Measured(), _Clock(pipe.device)
    spans: dict[str, list[tuple[Any, Any]]] = {part: [] for part in PARTS}
    undo: list[Callable[[], None]] = []
    open_spans: list[Any] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        open_spans.append(clock.now())

    def leave(part: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            spans[part].append((open_spans.pop(), clock.now()))

        return hook

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        found.calls += 1
        found.forwards += 1 if first is None else len(first)
        if found.noise is None and first is not None:
            found.noise = first.detach().clone()

    for network in networks(pipe):
        undo += [network.register_forward_pre_hook(count, with_kwargs=True).remove]
        undo += _span(network, enter, leave(NETWORK))
    for encoder in _encoders(pipe):
        undo += _span(encoder, enter, leave(TEXT))
    undo += _watch_decoder(pipe, found, clock, spans[DECODE])
    start = time.perf_counter()
    try:
        yield found
        clock.wait()
        found.seconds = time.perf_counter() - start
        found.parts = {part: sum(clock.between(*span) for span in spans[part]) for part in PARTS}
        found.steps = [clock.between(*span) for span in spans[NETWORK]]
    finally:
        for function in undo:
            function()


def _span(module: Any, enter: Callable[..., None], leave: Callable[..., None]) -> list[Callable[[], None]]:
    before = module.register_forward_pre_hook(enter, with_kwargs=True)
    return [before.remove, module.register_forward_hook(leave, with_kwargs=True).remove]


def _encoders(pipe: Any) -> list[torch.nn.Module]:
    names = [name for name in pipe.components if name.startswith(("text_encoder", "image_encoder"))]
    return [module for name in names if isinstance(module := getattr(pipe, name, None), torch.nn.Module)]


def _watch_decoder(pipe: Any, found: Measured, clock: _Clock, spans: list[tuple[Any, Any]]) -> list[Callable[[], None]]:
    vae: Any = getattr(pipe, "vae", None)
    decode = getattr(vae, "decode", None)
    if decode is None:
        return []

    def watched(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        start = clock.now()
        out = decode(latents, *args, **kwargs)
        spans.append((start, clock.now()))
        more = latents.detach()  # some pipelines decode row by row
        found.latents = more if found.latents is None else torch.cat([found.latents, more])
        return out

    def restore() -> None:
        del vae.decode
        vae.__dict__.update(before)

    before = {name: value for name, value in vae.__dict__.items() if name == "decode"}
    vae.decode = watched
    return [restore]

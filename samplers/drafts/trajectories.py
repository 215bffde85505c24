"""Whole trajectories of many samples: drafts by any sampler, of which a state on the way is kept, and their finish."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search import noise
from diffaccel.samplers.search.beginning import begins_at_image
from diffaccel.samplers.search.kept_region import KeptRegion
from diffaccel.session import Decode, Encode, Eval, Lent, Sampling, Session, Stages, Step, StreamPlace

Events = Generator[Any, Any, Any]
ROUNDING = 1e-6  # relative difference below which two noise levels are one


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a batch of trajectories came to.

    Attributes:
        x: the samples, ``(R, C, H, W)``.
        state: the state from which they can be finished in full, of the same shape.
        sigma: its noise level.
        nfe: predictions of each row; those that a cache stood in for do not count.
    """

    x: Tensor
    state: Tensor
    sigma: Tensor
    nfe: int


@dataclass(eq=False)
class RowsSession(Session):
    """The session of a call as a sampler sees it that draws other rows than the call's own.

    Attributes:
        base: the session of the call itself, of the same size.
        rows: for every row of ``x`` the row of the call that it belongs to.
        generators: one for every row.
        sizes: views of the same rows by their height and width.
        kept: the region of its image that the call keeps, or None.
        eps: noise of that region in every row.
    """

    base: Any = None
    rows: Sequence[int] = ()
    generators: list[torch.Generator] = field(default_factory=list)
    sizes: dict[tuple[int, int], RowsSession] = field(default_factory=dict)
    kept: KeptRegion | None = None
    eps: Tensor | None = None

    @classmethod
    def over(cls, base: Session, rows: Sequence[int], generators: list[torch.Generator], x: Tensor) -> RowsSession:
        """Return a view of ``base`` whose initial latents are ``x``."""
        values = {
            option.name: getattr(base, option.name) for option in fields(Session) if not option.name.startswith("_")
        }
        values |= {"generator": generators, "report": {}}
        view = cls(**values, base=base, rows=rows, generators=generators)
        view.__dict__["x"] = x  # the cached property
        return view

    def put_back(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return states of the rows at ``sigma`` with the kept region in them."""
        return x if self.kept is None else self.kept.put_back(x, sigma, self.eps, self.rows)

    def at(self, height: int, width: int) -> Session:
        """Return the view of the same rows at another resolution; its noise is fresh, from the rows' generators."""
        if (height, width) == (self.height, self.width):
            return self
        if (height, width) not in self.sizes:
            base = self.base.at(height, width)
            if begins_at_image(base):
                raise DiffAccelError(
                    "Drafts at another resolution begin at pure noise, and this call begins at an image. Use a draft "
                    "that keeps the resolution, such as 'steps:N', or call the pipeline with strength=1.0."
                )
            like = base.x[:1].expand(len(self.rows), *base.x.shape[1:])
            sibling = RowsSession.over(
                base, self.rows, self.generators, self.randn_like(like) * noise.initial_std(base)
            )
            sibling.sizes = self.sizes
            self.sizes[self.height, self.width] = self
            self.sizes[height, width] = sibling
        return self.sizes[height, width]


def draw(view: RowsSession, lent: Lent, target: Tensor, stream: str) -> Events:
    """Draw every row of a view to its end by the sampler that was lent, and return :class:`Drawn`.

    The state that is kept is the last one at full size whose level is at least ``target``; of a draft that comes to
    full size below it the first one there.

    Args:
        target: noise level of the call's own steps at which samples are to be finished.
        stream: name of these rows, for caches.

    Raises:
        DiffAccelError: for a sampler that asks for something else than predictions and pictures, and for one that never
            comes to the call's own size.
    """
    sampling = _own_steps(view, lent.steps) if lent.loop is None else _lent_steps(view, lent)
    followed, reply, sample = _Followed(view, target, stream, [_steps(view, lent)]), None, None
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration as stop:
            sample = stop.value
            break
        if isinstance(event, Eval):
            reply = yield followed.ask(event)
            followed.nfe += not reply.skipped
        elif isinstance(event, Step):
            followed.steps, reply = followed.steps + 1, view.put_back(event.x, event.sigma)
        elif isinstance(event, Stages):
            followed.ends, reply = list(accumulate(len(levels) - 1 for _, levels in event.parts)), None
        elif isinstance(event, Decode | Encode):
            reply = yield replace(event, at=_of_call(event.at or view))
        else:
            raise _unsuited(lent, f"it yields {type(event).__name__}")
    kept = followed.kept
    if kept is None or sample.shape != view.x.shape:
        raise _unsuited(lent, "it has no state of the call's own size from which the call's own steps could go on")
    return Drawn(view.put_back(sample, view.sigmas[-1]), kept.x, kept.sigma, followed.nfe)


@dataclass(eq=False)
class _Followed:
    """How far a batch of trajectories is.

    Attributes:
        ends: the step at which each stage ends.
        steps: steps made.
        nfe: predictions made by the network.
        kept: the request whose state samples are finished from.
    """

    view: RowsSession
    target: Tensor
    stream: str
    ends: list[int]
    steps: int = 0
    nfe: int = 0
    kept: Eval | None = None

    def ask(self, event: Eval) -> Eval:
        """Return a sampler's request as one to the call itself, and keep its state if samples are finished from it."""
        if event.x.shape != self.view.x.shape:
            self.kept = None
        elif not event.sigma.ndim and (self.kept is None or event.sigma >= self.target * (1 - ROUNDING)):
            self.kept = event
        stage = sum(self.steps >= end for end in self.ends[:-1])
        begin = self.ends[stage - 1] if stage else 0
        place = StreamPlace(f"{self.stream}.{stage}", self.steps - begin, self.ends[stage] - begin)
        own = range(len(self.view.rows)) if event.rows is None else event.rows
        rows = [self.view.rows[row] for row in own]
        return replace(event, rows=rows, at=_of_call(event.at or self.view), place=place)


def _unsuited(lent: Lent, why: str) -> DiffAccelError:
    name = "a sampler" if lent.loop is None else lent.loop.name
    return DiffAccelError(f"'{name}' cannot draw drafts: {why}. Use another draft.")


def finish(view: RowsSession, sigma: Tensor) -> Events:
    """Go on from a view's states at ``sigma`` by the call's own steps, ``x' = x + (sigma' - sigma) v``.

    Returns:
        The samples.
    """
    levels, x = levels_from(view.base, sigma), view.x
    for step, (level, below) in enumerate(pairwise(levels)):
        pred = yield Eval(x, level, rows=list(view.rows), place=StreamPlace("finish", step, len(levels) - 1))
        x = view.put_back(x + (below - level) * pred.v, below)
    return x


def levels_from(session: Session, sigma: Tensor) -> Tensor:
    """Return ``sigma`` and the call's own levels below it."""
    below = session.sigmas[session.sigmas < sigma * (1 - ROUNDING)]
    return torch.cat([sigma.reshape(1).to(below), below])


def _steps(view: RowsSession, lent: Lent) -> int:
    own = len(view.sigmas) - 1
    if lent.loop is None and (lent.steps or 0) > own:
        raise DiffAccelError(
            f"The drafts have {lent.steps} steps, and the call has {own}; they must be {own} or fewer."
        )
    return own if lent.steps is None else min(lent.steps, own)


def _own_steps(view: RowsSession, steps: int | None) -> Sampling:
    """Make Euler's steps over all of the call's own levels, or over ``steps + 1`` of them, evenly chosen."""
    sigmas = view.sigmas
    if steps is not None and steps < len(sigmas) - 1:
        chosen = [round(i * (len(sigmas) - 1) / steps) for i in range(steps + 1)]
        sigmas = sigmas[chosen]
    x = view.x
    for sigma, sigma_next in pairwise(sigmas):
        pred = yield Eval(x, sigma)
        x = yield Step(x + (sigma_next - sigma) * pred.v, sigma_next)
    return x


def _lent_steps(view: RowsSession, lent: Lent) -> Sampling:
    """Return the generator of the sampler that was lent, on a call of as many steps as the wish says."""
    sampling: Sampling
    if lent.steps is None:
        sampling = lent.loop.sample(view)
        return sampling
    base = view.base.reopen(num_inference_steps=lent.steps)
    if base.sigmas[0] != view.sigmas[0]:  # an image-to-image call rounds its share of the steps
        raise DiffAccelError(
            f"Drafts of {lent.steps} steps by '{lent.loop.name}' would begin at the noise level "
            f"{float(base.sigmas[0]):.4g}, and the call begins at {float(view.sigmas[0]):.4g}. Leave 'steps' out of "
            "the draft, or the other sampler."
        )
    sampling = lent.loop.sample(RowsSession.over(base, view.rows, view.generators, view.x))
    return sampling


def _of_call(session: Session) -> Session:
    """Return the call's own session behind a view of it."""
    base: Session = session.base if isinstance(session, RowsSession) else session
    return base

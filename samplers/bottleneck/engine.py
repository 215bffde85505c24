"""The stage engine: Euler's method at one size after the other, and what happens to the latents in between."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line, size_text
from diffaccel.flow import LINEAR, transport
from diffaccel.samplers.bottleneck.lift import lift
from diffaccel.samplers.bottleneck.resizing import Interpolation, crop_spectrum, expand_spectrum, interpolate
from diffaccel.samplers.bottleneck.stages import Stage
from diffaccel.samplers.search.noise import initial_std
from diffaccel.session import Decode, Encode, Eval, Pred, Sampling, Session, Stages, Step


@dataclass(frozen=True)
class Handover:
    """How a stage is entered from the one before.

    Attributes:
        kind: "spectrum" expands the noisy state; "noise" resizes the clean estimate and noises it; "lift" enlarges it
            in latents and through pixels, and noises it.
        resize: interpolation of clean estimates, or for "lift" of pixels.
        lift: share of places that go through pixels, and their least and greatest weight.
        shares_noise: whether all sizes have the call's own noise: of smaller ones its low frequencies.
    """

    kind: Literal["spectrum", "noise", "lift"]
    resize: Interpolation = "bilinear"
    lift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shares_noise: bool = False


def staged(session: Session, stages: Sequence[Stage], handover: Handover) -> Sampling:
    """Sample by Euler's method in each stage, and enter the next at its size (arXiv 2503.18940, 2605.18736)."""
    places = [_opened(session, stage.size) for stage in stages]
    levels = [sigmas_of(session, stage) for stage in stages]
    yield Stages(list(zip(places, levels, strict=True)))
    x = _begun(session, places[0], handover)
    pred: Pred | None = None
    for index, (at, sigmas) in enumerate(zip(places, levels, strict=True)):
        if pred is not None:
            x = yield from _entered(session, places[index - 1], at, stages[index], sigmas[0], x, pred, handover)
        for sigma, sigma_next in pairwise(sigmas):
            pred = yield Eval(x, sigma, at=at)
            x = yield Step(x + (sigma_next - sigma) * pred.v, sigma_next)
        if pred is not None:
            pred = Pred(session.path, x, sigmas[-1], pred.v)  # the last velocity, at the state that it led to
    return x


def _opened(session: Session, size: tuple[int, int]) -> Session:
    """Return the session of a stage's size; what an unlisted pipeline checks itself becomes one sentence.

    Raises:
        DiffAccelError: for a size that the pipeline does not draw.
    """
    try:
        return session.at(*size)
    except (DiffAccelError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError) as error:
        raise DiffAccelError(
            f"{type(session.pipe).__name__} does not draw at {size_text(*size)}, the size of a stage of a call of "
            f"{size_text(session.height, session.width)}: {first_line(error)} Make the picture or `scales` larger."
        ) from error


def sigmas_of(session: Session, stage: Stage) -> Tensor:
    """Return a stage's noise levels on the session's path: its own numbers where they are the call's."""
    levels = stage.levels.double()
    sigmas = levels if session.path is LINEAR else _on_path(session, levels)
    sigmas = sigmas.to(session.sigmas)
    if stage.own is None:
        return sigmas
    own = session.sigmas[stage.own.start - 1 : stage.own.stop]
    return own if stage.enters_own else torch.cat([sigmas[:1], own[1:]])


def _begun(session: Session, first: Session, handover: Handover) -> Tensor:
    """Return the state with which the first stage begins."""
    if not handover.shares_noise or first is session:
        return first.x
    return crop_spectrum(session.x, (first.x.shape[-2], first.x.shape[-1]))


def _noise(session: Session, at: Session, handover: Handover) -> Tensor:
    """Return noise of a session's size: fresh, or what the call's own noise is there."""
    if not handover.shares_noise:
        return session.randn_like(at.x)
    noise = session.x / initial_std(session)  # not by the first level: custom ones may begin below pure noise
    return crop_spectrum(noise, (at.x.shape[-2], at.x.shape[-1]))


def _on_path(session: Session, levels: Tensor) -> Tensor:
    """Convert noise levels of the linear path to the session's."""
    return cast(Tensor, session.path.at(LINEAR.rho(levels)))


def _entered(
    session: Session,
    before: Session,
    at: Session,
    stage: Stage,
    sigma: Tensor,
    x: Tensor,
    pred: Pred,
    handover: Handover,
) -> Generator[Any, Any, Tensor]:
    """Return the state with which a stage begins, ``(B, C, H, W)`` at ``sigma``."""
    noise, path = _noise(session, at, handover), session.path
    if handover.kind == "spectrum":
        linear, t = transport(x, pred.sigma.double(), path, LINEAR)
        expanded, t_new = expand_spectrum(linear, float(t), noise)
        return transport(expanded, torch.tensor(t_new, dtype=torch.float64, device="cpu"), LINEAR, path)[0].to(x)
    size = (noise.shape[-2], noise.shape[-1])
    if handover.kind == "lift" and size != tuple(x.shape[-2:]):
        pixels = yield Decode(pred.x0, at=before)
        enlarged = interpolate(pixels, (at.height, at.width), handover.resize)
        through_pixels = yield Encode(enlarged, at=at)
        x0 = lift(interpolate(pred.x0, size, "nearest"), through_pixels.to(x), *handover.lift)
    else:
        x0 = interpolate(pred.x0, size, handover.resize)
    level = sigma
    if stage.noised_to is not None:
        level = _on_path(session, torch.tensor(stage.noised_to, dtype=torch.float64, device="cpu")).to(sigma)
    return path.mix(x0, noise, level).to(x)

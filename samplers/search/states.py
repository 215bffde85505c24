"""The states that transitions lead to: first ones of fresh noise, and ``a x + b v + c z`` of a parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.samplers.search import noise
from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.kept_region import KeptRegion, carried_noise
from diffaccel.samplers.search.particles import Key, Pool, Transition
from diffaccel.session import Session, bcast

Row = tuple[Search, Transition]  # one row of a round: a transition, and the search that asks for it


class States(NamedTuple):
    """States of rows, ``(R, C, H, W)``.

    Attributes:
        x: the states.
        eps: the noise of their kept region; None where nothing is kept.
        log_ratios: ``log p / q`` of every transition under guidance, else 0.
    """

    x: Tensor
    eps: Tensor | None
    log_ratios: list[float]


@dataclass(frozen=True, eq=False)
class FirstStates:
    """First states of a call: its own latents where they are asked for, fresh noise elsewhere.

    Attributes:
        image: clean latents of every row that first states are noise on; None for pure noise.
        kept: the region of its image that the call keeps, or None.
    """

    session: Session
    image: Tensor | None = None
    kept: KeptRegion | None = None

    def draw(self, keys: Sequence[tuple[int, Key]], rows: Sequence[int], start: float | None = None) -> Tensor:
        """Return states ``(R, C, H, W)`` of seeds and keys, of which the first attempt of chain 0 is the call's own.

        Those of a call that begins at an image are ``alpha x0 + sigma eps`` of the image.

        Args:
            start: scale of pure noise, of the call's own too; None for the pipeline's.
        """
        like, path = self.session.x, self.session.path
        state, std = noise.normal(keys, like.shape[1:], like), noise.initial_std(self.session)
        if self.image is None:
            state = state * std
        else:
            begin = self.session.sigmas[0]
            state = path.alpha(begin) * self.image[list(rows)] + path.sigma(begin) * state
        own = _own(keys)
        state[own] = like[[rows[i] for i in own]]
        return state if start is None or self.image is not None else state * (start / std)

    def eps(self, keys: Sequence[tuple[int, Key]], rows: Sequence[int]) -> Tensor | None:
        """Return the noise of the kept region of these states; None where nothing is kept."""
        if self.kept is None:
            return None
        eps = noise.normal(keys, self.kept.noise.shape[1:], self.kept.noise)
        own = _own(keys)
        eps[own] = self.kept.noise[[rows[i] for i in own]]
        return eps


class StateMaker:
    """Makes the states of transitions, from those of their parents in the pool.

    Args:
        first: makes states without a parent.
        twist: factor of the gradients that move the means of transitions; None where particles have none stored.
    """

    def __init__(self, first: FirstStates, pool: Pool, twist: float | None) -> None:
        self.first, self.pool, self.twist = first, pool, twist
        self.session, self.kept = first.session, first.kept

    def make(self, rows: list[Row]) -> States:
        """Compute the state of every row."""
        like = self.session.x
        x, log_ratios = like.new_empty(len(rows), *like.shape[1:]), [0.0] * len(rows)
        eps = None if self.kept is None else torch.empty_like(x)
        starts = [i for i, (_, transition) in enumerate(rows) if transition.parent is None]
        if starts:
            keys = [(rows[i][0].seed, rows[i][1].key) for i in starts]
            call_rows = [rows[i][0].row for i in starts]
            x[starts] = self.first.draw(keys, call_rows, rows[starts[0]][0].plan.start)
            if eps is not None and (first_eps := self.first.eps(keys, call_rows)) is not None:
                eps[starts] = first_eps
        children = [i for i, (_, transition) in enumerate(rows) if transition.parent is not None]
        if not children:
            return States(x, eps, log_ratios)
        made = self._children([rows[i] for i in children])
        if len(children) == len(rows):
            return made
        x[children] = made.x
        if eps is not None and made.eps is not None:
            eps[children] = made.eps
        for i, log_ratio in zip(children, made.log_ratios, strict=True):
            log_ratios[i] = log_ratio
        return States(x, eps, log_ratios)

    def _children(self, rows: list[Row]) -> States:
        """Compute ``a x + b v + c z``, and ``log p / q`` where guidance moves its mean."""
        transitions, like = [transition for _, transition in rows], self.session.x
        x, v, *others = self.pool.get([transition.parent.slot for transition in transitions])  # type: ignore[misc,union-attr]
        columns = zip(*(transition.coefficients for transition in transitions), strict=True)
        a, b, c = (bcast(levels(column), x) for column in columns)
        state, z, log_ratios = a * x + b * v, None, [0.0] * len(rows)
        if any(transition.coefficients.c for transition in transitions):
            z = noise.normal([(search.seed, transition.key) for search, transition in rows], like.shape[1:], like)
            state += c * z
            if self.twist is not None:
                shift = self._shift(transitions, c, others[0])
                if self.kept is not None:  # kept pixels are put back, moved or not
                    shift = shift * self.kept.drawn([search.row for search, _ in rows])
                state += shift
                log_ratios = _log_ratios(shift, c, z)
        if self.kept is None:
            return States(state, None, log_ratios)
        sigmas = [transition.parent.sigma for transition in transitions]  # type: ignore[union-attr]
        eps = carried_noise(others[-1], sigmas, [transition.coefficients for transition in transitions], z)
        arrived = levels([transition.sigma for transition in transitions])
        state = self.kept.put_back(state, arrived, eps, [search.row for search, _ in rows])
        return States(state, eps, log_ratios)

    def _shift(self, transitions: list[Transition], c: Tensor, gradients: Tensor) -> Tensor:
        """Return by how much guidance moves the mean of each transition; by nothing where it has no noise."""
        path = self.session.path
        alphas = [float(path.alpha(transition.sigma)) for transition in transitions]
        slopes = [a / (a * a + t.sigma**2) for a, t in zip(alphas, transitions, strict=True)]
        return (self.twist or 0.0) * bcast(levels(slopes), gradients) * c * c * gradients


def _own(keys: Sequence[tuple[int, Key]]) -> list[int]:
    """Return the places of the call's own noise: the first attempt of chain 0."""
    return [i for i, (_, key) in enumerate(keys) if key.chain == key.attempt == 0]


def _log_ratios(shift: Tensor, c: Tensor, z: Tensor) -> list[float]:
    """Return ``log N(x'; m, c^2) / N(x'; m + shift, c^2)`` of every row, for ``x' = m + shift + c z``."""
    ratio = torch.where(c > 0, shift / c, 0.0).double()
    return (-0.5 * ratio * ratio - ratio * z).flatten(1).sum(1).tolist()


def levels(numbers: float | Sequence[float]) -> Tensor:
    """Return noise levels or coefficients in fp32 on the CPU, whatever torch's defaults are."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")

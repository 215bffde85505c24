"""Rankings of drafts: by a reward, by Elo ratings of a judge's pairs, or by insertion where it sees pairs only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.particles import Key

START, PER_POINT, MIDDLE = 1500.0, 100.0, 5.0  # rating of a draft of the middle score, and what a point of it is worth
SPREAD = 400.0  # rating points at which the odds are 10 to 1


@dataclass(eq=False)
class Drafted:
    """A draft of one prompt.

    Attributes:
        search: the search that it belongs to.
        index: its number there; number 0 has the call's own noise.
        batch: the drafts that were drawn together with it, in their order.
        stored: whether an earlier process of the same search drew and judged it.
        score: reward of the draft.
        rating: Elo rating, where a judge compares drafts.
        x: the draft's sample ``(C, H, W)``, and ``state`` at ``sigma`` from which it is finished; None once dropped.
        picture: pixels ``(3, H, W)`` in [0, 1] for a judge of pairs; None where nobody compares, and once dropped.
    """

    search: Search
    index: int
    batch: tuple[Drafted, ...] = field(default=(), repr=False)
    stored: bool = False
    score: float = math.nan
    rating: float = START
    x: Tensor | None = field(default=None, repr=False)
    state: Tensor | None = field(default=None, repr=False)
    sigma: Tensor | None = field(default=None, repr=False)
    picture: Tensor | None = field(default=None, repr=False)

    @property
    def key(self) -> Key:
        """Key of its noise."""
        return Key(self.index, 0, 0)

    def drop(self) -> None:
        """Free its latents and its picture; they can be drawn again."""
        self.x = self.state = self.sigma = self.picture = None


Pair = tuple[Drafted, Drafted]
Ask = Callable[[list[Pair]], list[tuple[float, float]]]  # of every pair: how sure the first wins, and a factor of K


class Ranking(Protocol):
    """A ranking of one prompt's drafts, best first."""

    order: list[Drafted]

    def add(self, drafts: Sequence[Drafted], ask: Ask) -> None:
        """Take up a batch of drafts, whose scores are known."""

    def settle(self, finalists: int, ask: Ask) -> None:
        """Look once more at the best ``finalists`` before they are finished."""


@dataclass
class ByReward:
    """Falling reward, equal ones by their number: what a tournament of a scalar reward comes to."""

    order: list[Drafted] = field(default_factory=list)

    def add(self, drafts: Sequence[Drafted], ask: Ask) -> None:
        self.order = sorted([*self.order, *drafts], key=lambda draft: (-draft.score, draft.index))

    def settle(self, finalists: int, ask: Ask) -> None:
        """Keep the order."""


@dataclass
class ByElo:
    """Elo ratings from a sparse tournament of every batch (arXiv 2607.04461).

    A draft begins at ``1500 + 100 (score - 5)``; the better half of a batch meets its neighbours, the better half of
    these all others, and the batch's winner the best three so far. ``E = 1 / (1 + 10^((R_b - R_a) / 400))`` is
    expected, and ``R += K (p_win - E)``.

    Args:
        k: ``K``, before the judge's factor.
        playoff: whether the finalists meet once more before they are finished, all of them, ranked by wins; the paper
            does not do this.
    """

    k: float = 32.0
    playoff: bool = True
    order: list[Drafted] = field(default_factory=list)
    _met: set[tuple[int, int]] = field(default_factory=set)

    def add(self, drafts: Sequence[Drafted], ask: Ask) -> None:
        for draft in drafts:
            draft.rating = START + (0.0 if math.isnan(draft.score) else PER_POINT * (draft.score - MIDDLE))
        kept = self._ranked(drafts)[: max(2, len(drafts) // 2)]
        count = min(3 * len(kept) // 2, len(kept) - 1)
        self.play(list(itertools.pairwise(kept))[:count], ask)
        finalists = self._ranked(kept)[: max(2, len(kept) // 2)]
        self.play(list(itertools.combinations(finalists, 2)), ask)
        winner = self._ranked(drafts)[0]
        self.play([(winner, other) for other in self.order[:3] if self._pair(winner, other) not in self._met], ask)
        self.order = self._ranked([*self.order, *drafts])

    def settle(self, finalists: int, ask: Ask) -> None:
        if self.playoff:
            self.order[:finalists] = by_chances(chances(self.order[:finalists], ask))

    def play(self, pairs: list[Pair], ask: Ask) -> None:
        """Let drafts meet and change their ratings, one pair after the other."""
        for (a, b), (won, factor) in zip(pairs, ask(pairs) if pairs else [], strict=True):
            expected = 1 / (1 + 10 ** ((b.rating - a.rating) / SPREAD))
            change = self.k * factor * (won - expected)
            a.rating, b.rating = a.rating + change, b.rating - change
            self._met.add(self._pair(a, b))

    def _ranked(self, drafts: Sequence[Drafted]) -> list[Drafted]:
        return sorted(drafts, key=lambda draft: (-draft.rating, draft.index))

    def _pair(self, a: Drafted, b: Drafted) -> tuple[int, int]:
        return min(a.index, b.index), max(a.index, b.index)


@dataclass
class ByInsertion:
    """Binary insertion into the best ``keep`` so far: a judge that contradicts itself nowhere gives their true order.

    Args:
        keep: length of the ranking; drafts that come after it are dropped from it.
    """

    keep: int
    order: list[Drafted] = field(default_factory=list)

    def add(self, drafts: Sequence[Drafted], ask: Ask) -> None:
        for draft in drafts:
            low, high = 0, len(self.order)
            if high >= self.keep:  # most drafts are worse than the last one
                if not self._beats(draft, self.order[-1], ask):
                    continue
                high -= 1
            while low < high:
                middle = (low + high) // 2
                if self._beats(draft, self.order[middle], ask):
                    high = middle
                else:
                    low = middle + 1
            self.order.insert(low, draft)
            del self.order[self.keep :]

    def settle(self, finalists: int, ask: Ask) -> None:
        """Keep the order."""

    def _beats(self, draft: Drafted, other: Drafted, ask: Ask) -> bool:
        return ask([(draft, other)])[0][0] > 0.5


def chances(drafts: Sequence[Drafted], ask: Ask) -> dict[Drafted, float]:
    """Return every draft's mean chance against the others, and 1/2 of one alone."""
    pairs = list(itertools.combinations(drafts, 2))
    total = dict.fromkeys(drafts, 0.0 if pairs else 0.5)
    for (a, b), (won, _) in zip(pairs, ask(pairs) if pairs else [], strict=True):
        total[a] += won
        total[b] += 1 - won
    return {draft: sum_ / max(1, len(drafts) - 1) for draft, sum_ in total.items()}


def by_chances(chance: dict[Drafted, float]) -> list[Drafted]:
    """Return drafts by falling chance, equal ones as they came."""
    return sorted(chance, key=lambda draft: -chance[draft])

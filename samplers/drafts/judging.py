"""The judge of drafts: scores and pairs of pictures, stored as they come so that a killed search is resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.drafts.ranking import Drafted, Pair
from diffaccel.samplers.rewards.pairs import compare
from diffaccel.samplers.search import noise
from diffaccel.samplers.search.chains import FROM_NOISE, Chain, RunningChain, Search
from diffaccel.samplers.search.particles import Key, Particle, Transition
from diffaccel.samplers.search.reward_log import RewardLog, numbers
from diffaccel.samplers.search.scoring import PictureScorer

SCORES, ENDS, PAIRS = range(3)  # what a line of the log holds, in the place of a chain's number
HIGH, MEDIUM = 2 / 3, 1 / 3  # least confidence of a factor of K (arXiv 2607.04461)
FACTORS = (1.2, 1.0, 0.7)


class Judging:
    """Scores and compares candidates, or takes what an earlier process of the same search was told.

    Args:
        scorer: decodes and scores.
        log: where answers are stored as they come.

    Attributes:
        compares: whether the reward judges pairs.
        pairs: number of pairs compared in this process.
    """

    def __init__(self, scorer: PictureScorer, log: RewardLog) -> None:
        self.scorer, self.log = scorer, log
        self.compares = scorer.reward.compare is not None
        self.pairs = 0
        self._lines = 0

    @property
    def is_stored(self) -> bool:
        """Whether the log has all that the next round asks for."""
        return any(line[0]["chain"] == ENDS for line in self.log.rounds[self._lines :])

    @property
    def has_more(self) -> bool:
        """Whether the log has the next answer."""
        return self._lines < len(self.log.rounds)

    def score(self, candidates: Sequence[Drafted], *, samples: bool) -> None:
        """Set the score of candidates, which lie one prompt after the other; of drafts a preview is enough."""

        def scores() -> list[float]:
            if not self.scorer.reward.scores:
                return [float("nan")] * len(candidates)
            rows = [candidate.search.row for candidate in candidates]
            return self.scorer(torch.stack([_present(candidate.x) for candidate in candidates]), rows, samples)

        known = self._known(SCORES, _counts(candidates), scores)
        if self.scorer.reward.compare is not None and any(not 0 <= score <= 10 for score in known if score == score):
            raise DiffAccelError(
                f"The judge of pairs gave the score {max(known, key=lambda score: abs(score - 5)):g}; scores beside "
                "comparisons must be from 0 to 10."
            )
        for candidate, score in zip(candidates, known, strict=True):
            candidate.score = score

    def end(self, search: Search, values: Callable[[], list[float]], count: int) -> list[float]:
        """Return what a round came to, ``count`` numbers, and close it in the log."""
        return self._known(ENDS, [(search, count)], values)

    def ask(self, pairs: list[Pair]) -> list[tuple[float, float]]:
        """Return how sure the first of every pair is better, and the factor of K by the judge's confidence.

        Which picture is shown first is drawn at random, by the pair alone.
        """
        search = pairs[0][0].search
        swapped = [noise.seed_of(search.seed, Key(a.index, b.index, 1)) % 2 == 1 for a, b in pairs]

        def answers() -> list[float]:
            shown = [(b, a) if swap else (a, b) for (a, b), swap in zip(pairs, swapped, strict=True)]
            first, second = (torch.stack([_present(pair[i].picture) for pair in shown]) for i in range(2))
            chances, confidences = compare(self.scorer.reward, first, second, [search.prompt] * len(pairs))
            self.pairs += len(pairs)
            return chances + confidences

        known = self._known(PAIRS, [(search, 2 * len(pairs))], answers)
        won, sure = known[: len(pairs)], known[len(pairs) :]
        won = [1 - chance if swap else chance for chance, swap in zip(won, swapped, strict=True)]
        return [(chance, factor(confidence)) for chance, confidence in zip(won, sure, strict=True)]

    def _known(self, what: int, counts: list[tuple[Search, int]], compute: Callable[[], list[float]]) -> list[float]:
        """Return the numbers of the next line of the log, or compute and store them."""
        move = Transition(None, 0.0, FROM_NOISE, Key(0, 0, 0), 0)
        chains = [RunningChain(search, what, _no_policy(), [move] * count) for search, count in counts]
        answers = self.log.replay(self._lines, chains)
        self._lines += 1
        if answers is not None:
            return [value for answer in answers for value in numbers(answer["rewards"])]
        values = compute()
        particles, rest = {}, iter(values)
        for chain in chains:
            particles[chain] = [Particle(0.0, 0, move.key, reward=next(rest)) for _ in chain.transitions]
        self.log.append(particles, guided=False)
        return values


def factor(confidence: float) -> float:
    """Return the factor of K: 1.2 of high confidence, 1 of medium, 0.7 of low (arXiv 2607.04461)."""
    return FACTORS[(confidence < HIGH) + (confidence < MEDIUM)]


def _counts(candidates: Sequence[Drafted]) -> list[tuple[Search, int]]:
    counts: dict[Search, int] = {}
    for candidate in candidates:
        counts[candidate.search] = counts.get(candidate.search, 0) + 1
    return list(counts.items())


def _present(tensor: Tensor | None) -> Tensor:
    """Return what a candidate must have by now."""
    if tensor is None:
        raise RuntimeError("a candidate is judged that was not drawn")
    return tensor


def _no_policy() -> Chain:
    """Ask for nothing: of these chains only the numbers of transitions count."""
    yield []
    return []

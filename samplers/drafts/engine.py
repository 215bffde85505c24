"""Rounds of drafts for every prompt of a call together, and the finish of the best of them in full."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.drafts.clock import Spending
from diffaccel.samplers.drafts.judging import Judging
from diffaccel.samplers.drafts.ranking import ByElo, ByInsertion, ByReward, Drafted, Ranking, by_chances, chances
from diffaccel.samplers.drafts.trajectories import Drawn, RowsSession, draw, finish, levels_from
from diffaccel.samplers.search import noise
from diffaccel.samplers.search.chains import Ledger, Search
from diffaccel.samplers.search.particles import Key, Particle
from diffaccel.samplers.search.reward_log import RewardLog
from diffaccel.samplers.search.scoring import PictureScorer
from diffaccel.samplers.search.states import FirstStates
from diffaccel.session import Draft, Lent, Progress, Session

Events = Generator[Any, Any, Any]
SEEN = 3  # of the best drafts so far that the winner of a batch meets


@dataclass(frozen=True)
class Recipe:
    """Sizes of a search by drafts, for one call.

    Attributes:
        acceleration: how drafts are drawn, by names of the registry; "" for in full.
        batch: drafts of a picture in a round.
        finish: how many of the best are finished.
        buffer: states kept beside those.
        resume: number of steps that a finish makes, the last of the call's.
        rows: maximum number of rows in a network call.
        elo: K of the ratings; None ranks a judge of pairs without scores by insertion.
        reranks: whether finished samples are judged once more, and the best of them comes first.
    """

    acceleration: str
    batch: int
    finish: int
    buffer: int
    resume: int
    rows: int
    elo: float | None
    reranks: bool


class Interrupted(Exception):
    """The user has interrupted the call."""


class DraftSearch:
    """Draws, judges and finishes drafts of all prompts of a call.

    Args:
        scorer: decodes and scores.
        log: where the judge's answers are stored.
        account: the budget, and what a round and the finish cost.
        first: where drafts begin, and the region of an image that is kept in all.

    Attributes:
        rounds: number of rounds so far.
        redrawn: number of drafts drawn again because their state had been dropped.
        nfe_before: predictions that an earlier process of the same search made and this one need not.
    """

    def __init__(
        self,
        session: Session,
        searches: Sequence[Search],
        recipe: Recipe,
        scorer: PictureScorer,
        log: RewardLog,
        account: Spending,
        first: FirstStates,
    ) -> None:
        self.first = first
        self.session, self.searches, self.recipe, self.account = session, searches, recipe, account
        self.judging = Judging(scorer, log)
        self.rounds = self.redrawn = self.nfe_before = 0
        self.target = session.sigmas[len(session.sigmas) - 1 - recipe.resume]
        self.rankings: dict[Search, Ranking] = {search: self._ranking() for search in searches}

    def _ranking(self) -> Ranking:
        if not self.judging.compares:
            return ByReward()
        if self.recipe.elo is None:
            return ByInsertion(max(self._kept, SEEN))
        return ByElo(self.recipe.elo, playoff=self.recipe.reranks)

    @property
    def _kept(self) -> int:
        return self.recipe.finish + self.recipe.buffer

    def run(self) -> Events:
        """Draft while the budget lasts, finish the best; return every search's samples, best first, with latents."""
        self.account.begin()
        while self.rounds == 0 or self.judging.is_stored or self.account.pays_for_round():
            before = self.account.spent
            yield from self.round()
            self.account.took(self.account.spent - before)
            self._check_budget()
        begin = self.account.spent
        results = yield from self.finish()
        self.account.finish = self.account.spent - begin
        return results

    def _check_budget(self) -> None:
        """Raise where one round and the finish are more predictions than the budget, which shows in the first round."""
        account = self.account
        if self.rounds == 1 and not account.seconds and account.round + account.finish > account.limit:
            raise too_small(account)

    def round(self) -> Events:
        """Draw, judge and rank one batch of drafts of every search."""
        begin, recipe = self.rounds * self.recipe.batch, self.recipe
        drafts = {s: [Drafted(s, begin + i) for i in range(recipe.batch)] for s in self.searches}
        flat, before = list(itertools.chain(*drafts.values())), self._nfe
        self.rounds += 1
        stored = self.judging.is_stored
        batches = yield from self._batches(flat, stored)
        if not stored:
            for batch in batches:
                yield from self._draw_batch(batch, batch)
            if self.judging.compares:  # of a resumed search, whose earlier rounds were not drawn
                yield from self._draw_again([d for r in self.rankings.values() for d in self._unseen(r)])
        self.judging.score(flat, samples=False)
        for search, ranking in self.rankings.items():
            ranking.add(drafts[search], self.judging.ask)
        nfe = [now - earlier for now, earlier in zip(self._nfe, before, strict=True)]
        first = self.searches[0]
        spent, *costs = self.judging.end(first, lambda: [self.account.spent, *map(float, nfe)], 1 + len(nfe))
        for search, cost in zip(self.searches, costs, strict=True):
            search.ledger.scored += self.recipe.batch
            if stored:
                self.account.begin(spent)
                search.ledger.nfe += int(cost)
                self.nfe_before += int(cost)
            self._note(search, drafts[search])

    def _note(self, search: Search, drafts: Sequence[Drafted]) -> None:
        """Add a round to the search's log, and free what no finish can need."""
        order = self.rankings[search].order
        for draft in drafts:
            if self.judging.scorer.reward.scores:
                level = 0.0 if draft.sigma is None else float(draft.sigma)
                search.observe(Particle(level, 0, draft.key, reward=draft.score))
        kept = order[: max(self._kept, SEEN if self.judging.compares else 0)]
        for draft in (*drafts, *order):
            if draft not in kept:
                draft.drop()
        ratings = {"ratings": [draft.rating for draft in kept]} if self.judging.compares else {}
        best = order[0].score
        score = {} if best != best else {"reward": best}
        search.note(round=self.rounds, drafts=len(drafts), best=[draft.index for draft in kept], **score, **ratings)

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _batches(self, drafts: Sequence[Drafted], stored: bool) -> Events:
        """Return drafts in batches of so many rows as fit, each of which caches see as a trajectory of its own."""
        lent: Lent = yield Draft(self.recipe.acceleration)
        rows = self.recipe.rows if lent.rows_apart else 1
        batches = [tuple(drafts[begin : begin + rows]) for begin in range(0, len(drafts), rows)]
        for batch in batches:
            for draft in batch:
                draft.batch, draft.stored = batch, stored
        return batches

    def _draw_again(self, drafts: Sequence[Drafted]) -> Events:
        """Draw dropped drafts again, to the same bits: together with those that they were drawn with."""
        for batch in dict.fromkeys(draft.batch for draft in drafts):
            wanted = [draft for draft in batch if draft in drafts]
            self.redrawn += len(wanted)
            yield from self._draw_batch(batch, wanted)

    def _unseen(self, ranking: Ranking) -> list[Drafted]:
        """Return the drafts whose pictures a judge may ask for and that have none."""
        return [draft for draft in ranking.order[: max(self._kept, SEEN)] if draft.picture is None]

    def _draw_batch(self, batch: Sequence[Drafted], wanted: Sequence[Drafted]) -> Events:
        lent: Lent = yield Draft(self.recipe.acceleration)
        view = self._view(batch)
        with self.judging.scorer.watch.part("network"):
            drawn: Drawn = yield from draw(view, lent, self.target, "draft")
        for row, draft in enumerate(batch):
            if not draft.stored:  # an earlier process was charged for it
                draft.search.ledger.nfe += drawn.nfe
            if draft in wanted:
                draft.x, draft.state, draft.sigma = drawn.x[row].clone(), drawn.state[row].clone(), drawn.sigma
        if self.judging.compares:
            scorer = self.judging.scorer
            parts = [scorer.pixels(part, preview=True) for part in drawn.x.split(scorer.batch_size)]
            pictures = [picture for part in parts for picture in part]
            for draft, picture in zip(batch, pictures, strict=True):
                draft.picture = picture if draft in wanted else draft.picture
        if not self.account.seconds:
            self.account.finish = float(self.recipe.finish * (len(levels_from(self.session, drawn.sigma)) - 1))
        yield from self._progress()

    def _view(self, drafts: Sequence[Drafted], states: Tensor | None = None) -> RowsSession:
        """Return the session of drafts at ``states``, or where they begin; number 0 has the call's own noise."""
        rows = [draft.search.row for draft in drafts]
        fresh = [(draft.search.seed, Key(draft.index, 1, 0)) for draft in drafts]
        generators = [torch.Generator("cpu").manual_seed(noise.seed_of(*key)) for key in fresh]
        keys = [(draft.search.seed, draft.key) for draft in drafts]
        x = self.first.draw(keys, rows) if states is None else states
        view = RowsSession.over(self.session, rows, generators, x)
        view.kept, view.eps = self.first.kept, self.first.eps(keys, rows)
        return view

    def _progress(self) -> Events:
        nfe = sum(self._nfe)
        if (yield Progress(nfe, nfe if self.account.seconds else sum(search.budget for search in self.searches))):
            raise Interrupted

    @property
    def _nfe(self) -> list[int]:
        return [search.ledger.nfe for search in self.searches]

    # -- the finish --------------------------------------------------------------------------------------------------

    def finish(self) -> Events:
        """Finish the best drafts in full from their own states, judge them and return them by search, best first."""
        for ranking in self.rankings.values():
            if self.judging.compares and not self.judging.has_more:
                yield from self._draw_again(self._unseen(ranking))
            ranking.settle(self._kept, self.judging.ask)
        promoted = [d for r in self.rankings.values() for d in r.order[: self.recipe.finish]]
        yield from self._draw_again([draft for draft in promoted if draft.state is None])
        yield Draft()
        finished = [replace(draft, picture=None) for draft in promoted]
        by_level: dict[float, list[Drafted]] = {}
        for draft in finished:
            by_level.setdefault(float(draft.sigma), []).append(draft)  # type: ignore[arg-type]
        for same in by_level.values():
            for begin in range(0, len(same), self.recipe.rows):
                yield from self._finish_batch(same[begin : begin + self.recipe.rows])
        self.judging.score(finished, samples=True)
        return {search: self._ranked(search, [d for d in finished if d.search is search]) for search in self.searches}

    def _finish_batch(self, batch: Sequence[Drafted]) -> Events:
        states = torch.stack([draft.state for draft in batch])  # type: ignore[misc]
        sigma: Any = batch[0].sigma
        with self.judging.scorer.watch.part("network"):
            x = yield from finish(self._view(batch, states), sigma)
        pictures = self.judging.scorer.pixels(x) if self.judging.compares else [None] * len(batch)
        for draft, sample, picture in zip(batch, x, pictures, strict=True):
            draft.x, draft.picture = sample, picture
            draft.search.ledger.nfe += len(levels_from(self.session, sigma)) - 1
            draft.search.ledger.scored += 1
        yield from self._progress()

    def _ranked(self, search: Search, finished: list[Drafted]) -> list[tuple[Particle, Tensor]]:
        """Return a search's finished samples, best first: by the reward or by their pairs, or as their drafts were."""
        order, chance = finished, {draft: draft.rating for draft in finished}
        if self.judging.compares and self.recipe.reranks:
            chance = chances(finished, self.judging.ask)
            order = by_chances(chance)
        elif self.recipe.reranks:
            order = sorted(finished, key=lambda draft: (-draft.score, draft.index))
        has_scores = self.judging.scorer.reward.scores
        rewards = {draft: draft.score if has_scores else chance[draft] for draft in finished}
        samples = []
        for draft in order:
            sample = Particle(0.0, 1, draft.key, reward=rewards[draft], end=True)
            search.observe(sample)
            samples.append((sample, draft.x))
        search.note(finished=[draft.index for draft in order], rewards=[rewards[draft] for draft in order])
        search.used |= {"rounds": self.rounds, "drafts": self.rounds * self.recipe.batch, "finished": len(order)}
        return samples  # type: ignore[return-value]

    def best_drafts(self) -> dict[Search, list[tuple[Particle, Tensor]]]:
        """Return the best draft of every search that was interrupted."""
        best = {search: ranking.order[0] for search, ranking in self.rankings.items() if ranking.order}
        if len(best) < len(self.searches) or any(draft.x is None for draft in best.values()):
            raise DiffAccelError("The search was stopped before anything was scored. Let it run longer.")
        return {s: [(Particle(0.0, 0, d.key, reward=d.score, end=True), d.x)] for s, d in best.items()}  # type: ignore[list-item]


def too_small(account: Spending) -> DiffAccelError:
    """Return the error of a budget that pays for less than one round and the finish."""
    return DiffAccelError(
        f"Drafts: a budget of {account.limit:.4g} {account.unit} is too small: one round of drafts takes "
        f"{account.round:.4g} {account.unit} and their finish {account.finish:.4g}. Raise it, or ask for fewer drafts, "
        "a cheaper draft or a smaller finish."
    )


def warm_up(search: DraftSearch) -> Events:
    """Measure a round and its finish on throw-away drafts with seeds of their own, and return both in seconds.

    The first turn is not measured: it pays for what is made once.
    """
    account = search.account
    for _ in range(2):
        spare = [replace(s, seed=s.seed ^ 1, ledger=Ledger(), log=[], climb=[], used={}) for s in search.searches]
        trial = DraftSearch(
            search.session, spare, search.recipe, search.judging.scorer, RewardLog(),
            Spending(spare, account.seconds), search.first,
        )  # fmt: skip
        trial.account.begin()
        yield from trial.round()
        trial.account.round = trial.account.spent
        yield from trial.finish()
        account.round, account.finish = trial.account.round, trial.account.spent - trial.account.round

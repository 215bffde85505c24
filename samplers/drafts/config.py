"""Drafts: many cheap samples of one prompt by any other method, and the best of them finished in full."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.drafts.clock import Spending
from diffaccel.samplers.drafts.engine import DraftSearch, Interrupted, Recipe, too_small, warm_up
from diffaccel.samplers.rewards import Reward
from diffaccel.samplers.search import report
from diffaccel.samplers.search.beginning import image_of
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import (
    SearchConfig,
    make_scorer,
    make_searches,
    warn_of_a_constant_reward,
)
from diffaccel.samplers.search.engine import MAX_ELEMENTS
from diffaccel.samplers.search.identity import identity
from diffaccel.samplers.search.kept_region import KeptRegion
from diffaccel.samplers.search.reward_log import RewardLog
from diffaccel.samplers.search.states import FirstStates
from diffaccel.session import Sampling, Session, Step

SHARE = 0.3  # of the steps that a finish makes: 15 of 50 (arXiv 2607.04461)
REAL, INTERVAL = 11 / 50, 3  # steps of the paper's drafts that are real: the first, and every third after them


@dataclass(frozen=True, kw_only=True)
class Drafts(SearchConfig):
    """Best of many drafts: cheap samples of many noises are judged, and the best are finished in full.

    A round draws ``drafts`` samples of a picture under an acceleration, decodes and judges them; rounds go on while
    the budget pays for one more and for the finish. The best ``finish`` are then resumed, from the state in which their
    own draft stood ``resume`` steps before the end, by the call's own steps ``x' = x + (sigma' - sigma) v`` without the
    acceleration. The first draft has the call's own noise. Latents ``(B, C, H, W)`` (arXiv 2607.04461).

    A reward with ``compare(images_a, images_b, prompts)`` is a judge of pairs: of how sure it is that the first picture
    is better, ``(b,)`` in [0, 1], or of that and its confidence. Its own scores, if it has any, are 0 to 10.

    Args:
        seconds: budget in seconds for each picture of the call, everything included; 0 for ``budget`` in NFE. What a
            round costs is measured once for a config, before the clock of its first call starts.
        preset: "default", or "paper": drafts as published, with forecasts of the network's output.
        draft: methods of the registry in one word: "taylorseer:interval=4", "bottleneck:preset=speed", "w8a8",
            "steps:4", or "plain" for drafts in full. None for those of the preset: half the steps, or the paper's.
        drafts: drafts of a picture in a round.
        finish: number of the best that are finished; None for 2, or the paper's 4.
        buffer: states kept beside these, of drafts that may come up. Others are drawn again if they do.
        resume: number of the call's last steps that are made in full; None for 3 of 10.
        ranking: how a judge of pairs ranks. "elo": by ratings, with ``K = elo_k``; "insertion": by binary insertion;
            "auto": "elo" where it scores pictures as well, else "insertion".
        elo_k: greatest change of a rating in one pair.
    """

    name: ClassVar[str] = "drafts"
    citation: ClassVar[str] = "Flash-BoN, arXiv 2607.04461"
    keeps_rows: ClassVar[bool] = True
    judges_pairs: ClassVar[bool] = True
    shares_calls: ClassVar[bool] = False

    seconds: float = 0.0
    preset: Literal["default", "paper"] = "default"
    draft: str | None = None
    drafts: int = 8
    finish: int | None = None
    buffer: int = 4
    resume: int | None = None
    ranking: Literal["auto", "elo", "insertion"] = "auto"
    elo_k: float = 32.0

    @classmethod
    def paper(cls, **options: Any) -> Self:
        """Return the published form: TaylorSeer drafts, 8 in a round, 4 finished from 15 of 50 steps before the end.

        Its drafts are scaled to the number of steps of the call. Of the published ones they lack the blocks that are
        left out entirely.
        """
        return cls(preset="paper", **options)

    def validate(self) -> None:
        super().validate()
        self.require_at_least(drafts=2, finish=1, buffer=0, seconds=0, elo_k=0, resume=1)
        if self.seconds:
            self.refuse_without_effect("seconds=0", "the budget is in seconds", budget=200)
        if self.ranking == "insertion":
            self.refuse_without_effect("ranking='elo'", "the ranking 'insertion' has no ratings", elo_k=32.0)
        if self.guide:
            raise DiffAccelError("Drafts.guide: drafts are not guided by a reward's gradient. Leave guide out.")
        if self.shared:
            raise DiffAccelError(
                "Drafts.shared: the processes of a launch do not share the drafts of one picture. Give each process "
                "pictures of its own."
            )
        why = "drafts hand back the best that is finished"
        self.refuse_without_effect("another method, such as 'bon'", why, draw=0.0, population=False)
        why = "drafts are shown to no callback"
        self.refuse_without_effect("another method, such as 'bon'", why, watch=False)
        if (self.finish or 1) > self.drafts:
            raise DiffAccelError(
                f"Drafts.finish is {self.finish}, and a round has {self.drafts} drafts; the budget may pay for one "
                "round only. Lower finish or raise drafts."
            )

    def chains(self, search: Search) -> list[Chain]:
        raise DiffAccelError("Drafts follow whole samples in rounds and have no chains.")

    def sample(self, session: Session) -> Sampling:
        return run(self, session)

    def recipe(self, session: Session, reward: Reward) -> Recipe:
        """Return the sizes for one call.

        Raises:
            DiffAccelError: for a ``resume`` beyond the call's steps, and a ranking of pairs that nobody compares.
        """
        if reward.compare is None:
            why = f"the reward '{reward.name}' compares no pictures, and drafts are ranked by what it says"
            self.refuse_without_effect(
                "a reward with compare(images_a, images_b, prompts)", why, ranking="auto", elo_k=32.0
            )
        steps, is_paper = len(session.sigmas) - 1, self.preset == "paper"
        resume = max(1, round(SHARE * steps)) if self.resume is None else self.resume
        if resume > steps:
            raise DiffAccelError(
                f"Drafts.resume is {resume}; the call makes {steps} steps, so it must be 1 to {steps}."
            )
        draft = self.draft
        if draft is None:
            draft = paper_draft(steps) if is_paper else f"steps:{math.ceil(steps / 2)}"
        finish = self.finish or min(4 if is_paper else 2, self.drafts)
        by_elo = self.ranking == "elo" or (self.ranking == "auto" and (reward.scores or is_paper))
        rows = self.max_batch or max(1, min(4096, MAX_ELEMENTS // session.x[0].numel()))
        return Recipe(
            draft, self.drafts, finish, self.buffer, resume, rows, self.elo_k if by_elo else None, reranks=not is_paper
        )


def paper_draft(steps: int) -> str:
    """Return the paper's drafts of FLUX for so many steps (arXiv 2607.04461).

    Real are the steps ``i < w`` and those with ``(i - w - 1) mod 3 = 0``, where ``w`` is 11 of 50; the others are
    forecast from these by first order.
    """
    warmup = max(2, round(REAL * steps))
    real = [i for i in range(steps) if i < warmup or (i - warmup - 1) % INTERVAL == 0]
    return f"taylorseer:order=1,payload=taylor,real_steps=[{','.join(map(str, real))}]"


def run(config: Drafts, session: Session) -> Sampling:
    """Search for every row of the call together, and return the best finished sample of each."""
    first = FirstStates(session, image_of(config, session), KeptRegion.of(session))
    if session.shared:
        raise DiffAccelError("Drafts of one call are not shared among the processes of a launch. Leave `shared` out.")
    plan, scorer = config.plan(session), make_scorer(config, session)
    recipe = config.recipe(session, scorer.reward)
    searches = make_searches(config, session, plan)
    folder = Path(config.folder) if config.folder else session.folder
    header = None if folder is None else identity(config, session, searches, plan, scorer.reward)
    account = Spending(searches, config.seconds * len(searches))
    with contextlib.closing(RewardLog(folder, header, keep=config.keep)) as log:
        search = DraftSearch(session, searches, recipe, scorer, log, account, first)
        interrupted = False
        try:
            if config.seconds:
                yield from _measure(config, search)
            results = yield from search.run()
        except Interrupted:
            results, interrupted = search.best_drafts(), True
        if config.seconds and not interrupted:
            _costs(config)[_kind_of_call(session)] = account.latest, account.finish
        for found, samples in results.items():
            found.samples = [sample for sample, _ in samples[: config.keep + 1]]
        if scorer.reward.scores:
            warn_of_a_constant_reward(searches, scorer)
        session.report["search"] = report.make_report(config, plan, searches, interrupted=interrupted)
        session.report["search_seconds"] = scorer.watch.report()
        if search.nfe_before:
            session.report["resumed"] = {"rounds": search.rounds, "nfe": search.nfe_before}
        if folder is not None:
            flat = [(found, pair) for found, samples in results.items() for pair in samples[: config.keep + 1]]
            latents = torch.stack([x for _, (_, x) in flat])
            report.write(folder, session.report["search"], scorer, [(f, sample) for f, (sample, _) in flat], latents)
        x0 = torch.stack([results[found][0][1] for found in searches])
        x = yield Step(x0, torch.tensor(plan.tail[-1], dtype=torch.float32, device="cpu"))
        return x


def _measure(config: Drafts, search: DraftSearch) -> Any:
    """Set what a round and the finish cost, from the latest call of this config alike or from a warm-up.

    Raises:
        DiffAccelError: for a budget that pays for less, naming both.
    """
    session, account = search.session, search.account
    costs, call = _costs(config), _kind_of_call(session)
    if call not in costs:
        yield from warm_up(search)
        costs[call] = account.round, account.finish
    account.round, account.finish = costs[call]
    if account.round + account.finish > account.limit:
        raise too_small(account)


def _costs(config: Drafts) -> dict[Any, tuple[float, float]]:
    """Return what a round and the finish took in the calls of a config so far, by the kind of call."""
    costs: dict[Any, tuple[float, float]] = vars(config).setdefault("_costs", {})
    return costs


def _kind_of_call(session: Session) -> tuple[Any, ...]:
    """Return what the seconds of a round depend on, beside the config."""
    return type(session.pipe).__name__, tuple(session.x.shape), len(session.sigmas), str(session.device)

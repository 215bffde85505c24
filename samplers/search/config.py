"""The base of all searches: common options, and the sampler that runs a method's chains through the engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffaccel.config import Level, Machine, SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import rewards
from diffaccel.samplers.search import noise, report
from diffaccel.samplers.search.beginning import image_of
from diffaccel.samplers.search.budget import shares
from diffaccel.samplers.search.chains import Chain, RunningChain, Search
from diffaccel.samplers.search.engine import Engine
from diffaccel.samplers.search.identity import identity
from diffaccel.samplers.search.kept_region import KeptRegion
from diffaccel.samplers.search.particles import Particle
from diffaccel.samplers.search.plan import KernelName, PathName, ScaleName, SearchPlan, make_plan
from diffaccel.samplers.search.population import ALL, handed_back, images_a_search
from diffaccel.samplers.search.preview import model_name, preview_decoder
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.reward_log import RewardLog
from diffaccel.samplers.search.scoring import PictureScorer
from diffaccel.samplers.search.states import FirstStates
from diffaccel.session import Sampling, Session, Step

logger = logging.getLogger(__name__)

FRAMES_PER_LATENT = 4  # of a video, about


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SamplerConfig):
    """Base of searches.

    Args:
        reward: what a better picture scores higher: a name such as "clip" or "compress", a weighted sum of names, or a
            callable ``(images, prompts) -> scores`` of images ``(b, 3, H, W)`` in [0, 1].
        budget: maximum number of predictions (NFE) per picture; a guided one counts once.
        guide: factor of ``x0 + guide grad r(x0)`` at every prediction, for a differentiable reward; 0 for none.
        reward_device: device on which pictures are decoded and scored, "" for the pipeline's device. On another one
            scoring overlaps with the next predictions.
        preview: cheaper decoder for scores on the way, while samples themselves are always decoded in full: "linear", a
            map from latents to colours fitted to the pipeline's VAE; a
            folder of a diffusers ``AutoencoderTiny``; or a function from latents to pixels in [-1, 1].
        keep: number of a picture's samples that are kept beside what comes back.
        draw: temperature T of a draw by ``exp(r / T)`` among all finished samples, which comes back instead of the best
            one; 0 for the best.
        population: whether the images of one prompt (``num_images_per_prompt``) are the best samples, or draws, of one
            search with the budgets of all of them; otherwise each is the best of its own.
        watch: whether the pipeline's ``callback_on_step_end`` is also called after every round: ``latents`` are clean
            ones of the best of every picture so far, ``preview`` these decoded, ``(B, 3, H, W)`` in [0, 1], and
            ``rewards``, ``nfe`` and ``budget`` tell the rest. What it returns then has no effect.
        folder: where a search writes its trace, its plot and the kept samples, and from which it is resumed after a
            kill.
        shared: whether all processes of an ``accelerate launch`` work on the same call.
    """

    searches: ClassVar[bool] = True
    shares_calls: ClassVar[bool] = True  # all processes of a launch may make one call together
    # options left out of records where they have their default
    younger: ClassVar[tuple[str, ...]] = ("preview", "draw", "population", "watch")
    judges_pairs: ClassVar[bool] = False  # can use a reward that compares pictures and does not score them
    keeps_rows: ClassVar[bool] = False

    reward: Any = "clip"
    budget: int = 200
    guide: float = 0.0
    reward_device: str = ""
    preview: Any = None
    keep: int = 0
    draw: float = 0.0
    population: bool = False
    watch: bool = False
    folder: str = ""
    shared: bool = False

    def validate(self) -> None:
        super().validate()
        self.require_at_least(budget=1, keep=0, guide=0, draw=0)
        if self.state != "float32":
            raise DiffAccelError(
                f"{type(self).__name__}.state is '{self.state}'; a search keeps its states in 'float32'."
            )
        if self.guide and self.preview:
            raise DiffAccelError(
                f"{type(self).__name__}.preview has no effect with guide, whose gradients go through the full decoder. "
                "Leave one of them out."
            )

    def require_at_least(self, **minimums: float) -> None:
        """Raise for the first of these fields that is below its minimum."""
        for field, minimum in minimums.items():
            value = getattr(self, field)
            if value is not None and value < minimum:
                raise DiffAccelError(f"{type(self).__name__}.{field} is {value}; it must be at least {minimum}.")

    def refuse_without_effect(self, advice: str, why: str, **defaults: Any) -> None:
        """Raise for the first of these fields that has another value than its default, where none has an effect."""
        for field, default in defaults.items():
            if getattr(self, field) != default:
                raise DiffAccelError(
                    f"{type(self).__name__}.{field} is {getattr(self, field)!r}, which has no effect: {why}. Set "
                    f"{advice}, or leave {field} out."
                )

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        return "fast", "works everywhere, inpainting too: time follows NFE, the budget, and the reward's own cost"

    def to_dict(self) -> dict[str, Any]:
        """Return the options, JSON-ready; a reward that is not text is given by its name."""
        options = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in self.younger or getattr(self, field.name) != field.default
        }
        for option in ("reward", "preview"):
            value = options.get(option, "")
            if not isinstance(value, str):
                options[option] = getattr(value, "name", getattr(value, "__name__", type(value).__name__))
        return {"name": self.name, **options}

    # -- what a method defines --------------------------------------------------------------------------------------

    @property
    def target_temperature(self) -> float | None:
        """Temperature of ``p(x0) exp(r(x0) / temperature)`` where the particles are weighed to follow that."""
        return None

    def chains(self, search: Search) -> list[Chain]:
        """Return the method's generators for one prompt, each of which returns its samples, best first.

        Raises:
            DiffAccelError: for a budget that the method cannot use, naming the least.
        """
        raise NotImplementedError

    def plan(self, session: Session) -> SearchPlan:
        """Return noise levels and kernels for one call: its own levels, without fresh noise."""
        return make_plan(session.schedule, path="linear", norm=0.0)

    # -- the sampler --------------------------------------------------------------------------------------------------

    def sample(self, session: Session) -> Sampling:
        return run(self, session)


@dataclass(frozen=True, kw_only=True)
class PathSearchConfig(SearchConfig):
    """Base of searches along a path, where children of one state differ by fresh noise.

    Args:
        path: the noise levels. "native": the call's own, to the end, with DDPM's noise between them; "linear": the
            same with noise by ``scale``; "vp": those of the variance-preserving path, then a deterministic tail.
        kernel: "cps" keeps every marginal exactly; "em" is Euler-Maruyama.
        scale: name of ``f`` of the strength ``g(t) = norm f(t)`` of the fresh noise; None is "square". It is no option
            of "native".
        norm: factor of that strength, None for 3; on "native" the share of DDPM's noise, at most 1, None for 1.
        stages: noise levels of "vp" that are searched, None for 10; the other paths take the call's own.
        tail_steps: deterministic steps after the search on "vp": None or -1 for the call's own from there, 0 for none,
            where the sample is a posterior mean.
        score_from: share of the searched levels before the first that is scored and chosen by: near noise ``r(x0)``
            says little of the sample, and decoding costs as much as anywhere.
        score_to: share of the searched levels after which none is scored but the last one.
        score_every: of those between them every so many are scored. At levels without a score all states go on.
    """

    younger: ClassVar[tuple[str, ...]] = (*SearchConfig.younger, "score_from", "score_to", "score_every")

    path: PathName = "native"
    kernel: KernelName = "cps"
    scale: ScaleName | None = None
    norm: float | None = None
    stages: int | None = None
    tail_steps: int | None = None
    score_from: float = 0.0
    score_to: float = 1.0
    score_every: int = 1

    def validate(self) -> None:
        super().validate()
        self.require_at_least(stages=2, tail_steps=-1, norm=0, score_from=0, score_every=1)
        if self.score_from >= 1:
            raise DiffAccelError(
                f"{type(self).__name__}.score_from is {self.score_from}; it is a share of the levels, below 1."
            )
        if not self.score_from <= self.score_to <= 1:
            raise DiffAccelError(
                f"{type(self).__name__}.score_to is {self.score_to}; it is a share of the levels, from score_from "
                f"({self.score_from:g}) to 1."
            )
        if self.path != "vp":
            why = f"the path '{self.path}' has the call's own levels, to the end"
            self.refuse_without_effect("path='vp'", why, stages=None, tail_steps=None)
        if self.path == "native":
            why = "the path 'native' has DDPM's noise"
            self.refuse_without_effect("path='linear' or 'vp'", why, scale=None)
            if self.norm is not None and self.norm > 1:
                raise DiffAccelError(
                    f"{type(self).__name__}.norm is {self.norm:g}; on the path 'native' it is a share of DDPM's noise, "
                    "at most 1. Lower it, or set path='linear' or 'vp'."
                )
        if self.kernel == "em" and (self.scale == "ancestral" or self.path == "native"):
            raise DiffAccelError(
                f"{type(self).__name__}: ancestral noise, which the path 'native' has, is of the kernel 'cps'. Set "
                "kernel='cps', or path='linear' or 'vp' and another scale."
            )

    def plan(self, session: Session) -> SearchPlan:
        given = {"scale": self.scale, "norm": self.norm, "stages": self.stages, "tail_steps": self.tail_steps}
        options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
        return make_plan(session.schedule, path=self.path, kernel=self.kernel, **options)

    def tries(self, search: Search, chains: int, *, one_noise: bool = False) -> list[list[int]]:
        """Return how many states each chain may try at each level; with ``one_noise`` one at the first.

        All of ``budget - tail`` is spent, as evenly as whole tries go.

        Raises:
            DiffAccelError: for fewer than two a level, which leave nothing to choose from, and as
                :meth:`check_budget` does.
        """
        plan = search.plan
        levels = plan.stages - one_noise
        self.check_budget(
            search, chains * (2 * levels + one_noise + plan.tail_nfe),
            f"{chains} chains of 2 tries, which is the least to choose from, at {levels} levels, and "
            f"{plan.tail_nfe + one_noise} predictions of the {'first noise and the ' * one_noise}tail",
        )  # fmt: skip
        counts = shares(search.budget - chains * (plan.tail_nfe + one_noise), chains, levels)
        return [[1, *count] for count in counts] if one_noise else counts

    def check_budget(self, search: Search, minimum: int, why: str) -> None:
        """Raise for a budget below ``minimum``, or a plan without fresh noise, whose children would all be equal."""
        if search.budget < minimum:
            raise DiffAccelError(
                f"{type(self).__name__}: a budget of {search.budget} NFE is too small, it takes {minimum}: {why}. "
                "Raise budget, or ask for less of these."
            )
        if not search.plan.stochastic:
            raise DiffAccelError(
                f"{type(self).__name__}: no noise is fresh between the levels, so all children are equal. Raise norm."
            )


def run(config: SearchConfig, session: Session) -> Sampling:
    """Search for every row of the call in parallel, and return the best sample of each."""
    first = FirstStates(session, image_of(config, session), KeptRegion.of(session))
    plan, scorer, images = config.plan(session), make_scorer(config, session), images_a_search(config, session)
    searches = make_searches(config, session, plan, images)
    chains = [RunningChain(search, i, policy) for search in searches for i, policy in enumerate(config.chains(search))]
    processes = SearchProcesses.of_launch(session.device) if config.shared or session.shared else SearchProcesses()
    folder = Path(config.folder) if config.folder else session.folder
    header = None if folder is None else identity(config, session, searches, plan, scorer.reward)
    with contextlib.closing(RewardLog(folder, header, processes=processes, keep=config.keep)) as log:
        engine = Engine(
            session, scorer, reward_log=log, processes=processes, rows=config.max_batch,
            overlap=scorer.elsewhere(session.device), guide=config.guide, temperature=config.target_temperature,
            first=first, watched=config.watch,
        )  # fmt: skip
        interrupted = yield from engine.run(chains)
        results = _results(config, searches, images, interrupted=interrupted)
        warn_of_a_constant_reward(searches, scorer)
        x0 = engine.latents([(search, sample) for search, samples in results.items() for sample in samples[:images]])
        session.report["search"] = report.make_report(config, plan, searches, interrupted=interrupted)
        session.report["search_seconds"] = scorer.watch.report()
        if log.rounds:
            session.report["resumed"] = {"rounds": len(log.rounds), "nfe": engine.nfe_before}
        if folder is not None:
            flat = [(search, sample) for search, samples in results.items() for sample in samples]
            if processes.rank == 0:
                report.write(folder, session.report["search"], scorer, flat, engine.latents(flat))
            if not interrupted:
                engine.store_results([sample for _, sample in flat], config.keep)
        x = yield Step(x0, torch.tensor(plan.tail[-1], dtype=torch.float32, device="cpu"))
        return x


def make_searches(config: SearchConfig, session: Session, plan: SearchPlan, images: int = 1) -> list[Search]:
    """Make one search for every ``images`` rows of the call, with the prompt and seed of the first."""
    seeds = noise.seeds(session.generator, len(session.x))
    shares_of_levels = getattr(config, "score_from", 0.0), getattr(config, "score_to", 1.0)
    first, until = (int(share * plan.stages) for share in shares_of_levels)
    every = getattr(config, "score_every", 1)
    keep = ALL if config.draw else config.keep + images - 1
    rows = list(enumerate(zip(session.prompts, seeds, strict=True)))[::images]
    return [
        Search(row, prompt, seed, plan, config.budget * images, keep, first=first, until=until, every=every)
        for row, (prompt, seed) in rows
    ]


def _results(
    config: SearchConfig, searches: Sequence[Search], images: int, *, interrupted: bool
) -> dict[Search, list[Particle]]:
    """Return what each search hands back, images first; of an interrupted one without samples, its best state."""
    results = {search: search.samples or [search.best] for search in searches if search.best is not None}
    if len(results) < len(searches):
        raise DiffAccelError("The search was stopped before anything was scored. Let it run longer.")
    for search, samples in results.items():
        if interrupted:  # as many images as were asked for, of whatever there is
            results[search] = [*samples, *samples[:1] * images][: max(images, len(samples))]
        elif config.draw or images > 1:
            results[search] = handed_back(search, samples, images, config.draw)
        search.samples = search.samples and results[search][: config.keep + images]
        results[search] = results[search][: config.keep + images]
    return results


def warn_of_a_constant_reward(searches: Sequence[Search], scorer: PictureScorer) -> None:
    """Log where a reward was the same for all that a search saw."""
    constant = [s.rewards[0] for s in searches if s.rewards and s.rewards[0] == s.rewards[1] and s.ledger.scored > 1]
    if constant:
        logger.warning(
            "The reward '%s' was %g for all that the search of %d of %d pictures saw, so it could not choose.",
            scorer.reward.name, constant[0], len(constant), len(searches),
        )  # fmt: skip


def make_scorer(config: SearchConfig, session: Session) -> PictureScorer:
    """Return the scorer of one call: the config's reward, on its device, with the pipeline's decoder."""
    device = torch.device(config.reward_device) if config.reward_device else session.device
    model = model_name(session.pipe)
    cache = vars(config).setdefault("_rewards", {})  # a network is loaded once per config, not once per call
    if (device, model) not in cache:
        cache[device, model] = rewards.resolve(config.reward, device=device, model=model)
    reward = cache[device, model]
    if reward.needs_prompts and not all(session.prompts):
        raise DiffAccelError(
            f"The reward '{reward.name}' reads the prompt, and this call has none: pass `prompt`, not embeddings "
            "alone, or take a reward that looks at the picture only."
        )
    if not (reward.scores or config.judges_pairs):
        raise DiffAccelError(
            f"The reward '{reward.name}' compares pictures and does not score them; '{config.name}' needs scores. Let "
            "it be called with (images, prompts) as well, or search by 'drafts'."
        )
    size = (device, model, session.height, session.width)
    if size not in cache or config.preview == "full":
        cache[size] = preview_decoder(config.preview, session, device)
    frames = 1 if session.x.ndim == 4 else FRAMES_PER_LATENT * session.x.shape[2]
    pixels = session.height * session.width * frames
    return PictureScorer(reward, session.decoder(device), session.prompts, pixels, device, cache[size])

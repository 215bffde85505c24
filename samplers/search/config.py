"""What every search has in common: its options, and one sampler that runs a policy's chains through the engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffaccel.config import Level, Machine, SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import rewards
from diffaccel.samplers.search import noise
from diffaccel.samplers.search import plan as plans
from diffaccel.samplers.search import report as outcome
from diffaccel.samplers.search.chains import Chain, Search, Task
from diffaccel.samplers.search.engine import Engine
from diffaccel.samplers.search.plan import KernelName, PathName, ScaleName, SearchPlan
from diffaccel.samplers.search.processes import Processes
from diffaccel.samplers.search.reward_log import Trace
from diffaccel.samplers.search.scoring import Judge
from diffaccel.session import Sampling, Session, Step

logger = logging.getLogger(__name__)

FRAMES_EACH = 4  # of a video, about so many come of one of its latents
ELSEWHERE = ("max_batch", "reward_device", "keep", "folder", "shared")  # options that no decision depends on


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SamplerConfig):
    """Base of searches.

    Args:
        reward: what a better picture scores higher: a name such as "clip" or "compress", a weighted sum of names, or a
            callable ``(images, prompts) -> scores`` of images ``(b, 3, H, W)`` in [0, 1].
        budget: most predictions (NFE) a picture; a guided one counts once.
        guide: of ``x0 + guide grad r(x0)`` at every prediction, for a differentiable reward; 0 for none.
        reward_device: where pictures are decoded and scored, "" for the pipeline's device. Elsewhere it overlaps with
            the next predictions.
        keep: samples of a picture's search that are kept beside the best.
        folder: where a search leaves its trace, its plot and the kept samples, and goes on after a kill.
        shared: all processes of an ``accelerate launch`` work on the same call.
    """

    searches: ClassVar[bool] = True

    reward: Any = "clip"
    budget: int = 200
    guide: float = 0.0
    reward_device: str = ""
    keep: int = 0
    folder: str = ""
    shared: bool = False

    def validate(self) -> None:
        super().validate()
        self.at_least(budget=1, keep=0, guide=0)
        if self.state != "float32":
            raise DiffAccelError(
                f"{type(self).__name__}.state is '{self.state}'; a search keeps its states in 'float32'."
            )

    def at_least(self, **least: float) -> None:
        """Raise for the first of these fields that is smaller."""
        for field, smallest in least.items():
            if getattr(self, field) < smallest:
                raise DiffAccelError(
                    f"{type(self).__name__}.{field} is {getattr(self, field)}; it must be at least {smallest}."
                )

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        return "fast", "works everywhere: time follows NFE, which is the budget, and the reward's own cost"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a reward that is no text is its name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.reward, str):
            found["reward"] = getattr(self.reward, "name", getattr(self.reward, "__name__", type(self.reward).__name__))
        return {"name": self.name, **found}

    # -- what a method says -----------------------------------------------------------------------------------------

    def chains(self, search: Search) -> list[Chain]:
        """The method's generators for one prompt; each returns samples, best first.

        Raises:
            DiffAccelError: for a budget that the method cannot use, naming the least.
        """
        raise NotImplementedError

    def plan(self, session: Session) -> SearchPlan:
        """Noise levels and kernels for one call: its own, without fresh noise."""
        return plans.make(session.schedule, path="linear", norm=0.0)

    # -- the sampler --------------------------------------------------------------------------------------------------

    def sample(self, session: Session) -> Sampling:
        return run(self, session)


@dataclass(frozen=True, kw_only=True)
class PathSearchConfig(SearchConfig):
    """Base of searches along a path, where children of one state differ by fresh noise.

    Args:
        path: of the noise levels. "native": the call's own, to the end, with the noise of DDPM between them; "linear":
            the same with noise by ``scale``; "vp": those of the variance-preserving path, then a deterministic tail.
        kernel: "cps" keeps every marginal exactly; "em" is Euler-Maruyama.
        scale, norm: of the fresh noise, ``g(t) = norm f(t)``.
        stages: noise levels of "vp" that are searched; the other paths take the call's own steps.
        tail_steps: deterministic steps after the search: -1 for the call's own steps from there, 0 for none, where
            the sample is a posterior mean.
    """

    path: PathName = "native"
    kernel: KernelName = "cps"
    scale: ScaleName = "square"
    norm: float = 3.0
    stages: int = 10
    tail_steps: int = -1

    def validate(self) -> None:
        super().validate()
        self.at_least(stages=2, tail_steps=-1, norm=0)
        if self.kernel == "em" and (self.scale == "ancestral" or self.path == "native"):
            raise DiffAccelError(
                f"{type(self).__name__}: ancestral noise, which the path 'native' has, is of the kernel 'cps'. Set "
                "kernel='cps', or path='linear' or 'vp' and another scale."
            )

    def plan(self, session: Session) -> SearchPlan:
        return plans.make(
            session.schedule, path=self.path, kernel=self.kernel, scale=self.scale, norm=self.norm, stages=self.stages,
            tail_steps=self.tail_steps,
        )  # fmt: skip

    def each(self, search: Search, chains: int) -> int:
        """States that each of ``chains`` may try at every level: ``floor((budget - tail) / (chains stages))``.

        Raises:
            DiffAccelError: as :meth:`check` says.
        """
        plan = search.plan
        self.check(
            search, chains * (plan.stages + plan.tail_nfe),
            f"{chains} chains of {plan.stages} levels and {plan.tail_nfe} steps of the tail",
        )  # fmt: skip
        return (search.budget - chains * plan.tail_nfe) // (chains * plan.stages)

    def check(self, search: Search, least: int, why: str) -> None:
        """Raise for a budget below ``least``, or children that are all equal."""
        if search.budget < least:
            raise DiffAccelError(
                f"{type(self).__name__}: a budget of {search.budget} NFE is too small, it takes {least}: {why}. "
                "Raise budget, or ask for less of these."
            )
        if not search.plan.stochastic:
            raise DiffAccelError(
                f"{type(self).__name__}: no noise is fresh between the levels, so all children are equal. Raise norm."
            )


def run(config: SearchConfig, session: Session) -> Sampling:
    """Search for every row of the call, side by side, and return the best sample of each."""
    if len(session.timesteps) < len(getattr(session.scheduler, "timesteps", ())):
        raise DiffAccelError(
            f"{type(config).__name__} searches from pure noise, and this call begins in the middle of its noise "
            "levels, at an image: other noise would lose it. Call the pipeline with strength=1.0, or without a search."
        )
    plan, judge = config.plan(session), make_judge(config, session)
    seeds, prompts = noise.seeds(session.generator, len(session.x)), session.prompts
    searches = [
        Search(row, prompt, seed, plan, config.budget, config.keep)
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    tasks = [Task(search, i, chain) for search in searches for i, chain in enumerate(config.chains(search))]
    processes = Processes.of_launch(session.device) if config.shared or session.shared else Processes()
    folder = Path(config.folder) if config.folder else session.folder
    method = {option: value for option, value in config.to_dict().items() if option not in ELSEWHERE}
    about = {"method": method, "prompts": prompts, "seeds": seeds, "sigmas": list(plan.sigmas)}
    engine = Engine(
        session, judge, trace=Trace(folder, about, processes=processes), processes=processes,
        rows=config.max_batch, overlap=judge.elsewhere(session.device), guide=config.guide,
    )  # fmt: skip
    interrupted = yield from engine.run(tasks)
    found = {search: search.samples or [search.best] for search in searches if search.best is not None}
    if len(found) < len(searches):
        raise DiffAccelError("The search was stopped before anything was scored. Let it run longer.")
    flat = [s.rewards[0] for s in searches if s.rewards and s.rewards[0] == s.rewards[1] and s.ledger.scored > 1]
    if flat:
        logger.warning(
            "The reward '%s' was %g for all that the search of %d of %d pictures saw, so it could not choose.",
            judge.reward.name, flat[0], len(flat), len(searches),
        )  # fmt: skip
    x0 = yield from engine.latents([(search, samples[0]) for search, samples in found.items()])
    session.report["search"] = outcome.report(config, plan, searches, interrupted=interrupted)
    if folder is not None:
        kept = [(search, sample) for search, samples in found.items() for sample in samples]
        latents = yield from engine.latents(kept)  # by all processes: what a trace alone knows is computed together
        if processes.rank == 0:
            outcome.write(folder, session.report["search"], judge, kept, latents)
    x = yield Step(x0, torch.tensor(plan.tail[-1]))
    return x


def make_judge(config: SearchConfig, session: Session) -> Judge:
    """The reward of the config, on its device, for one call."""
    device = torch.device(config.reward_device) if config.reward_device else session.device
    model = str(getattr(session.pipe.config, "_name_or_path", "") or getattr(session.pipe, "name_or_path", ""))
    kept = vars(config).setdefault("_rewards", {})  # a network is loaded once, not for every call
    if (device, model) not in kept:
        kept[device, model] = rewards.resolve(config.reward, device=device, model=model)
    reward = kept[device, model]
    if reward.needs_prompts and not all(session.prompts):
        raise DiffAccelError(
            f"The reward '{reward.name}' reads the prompt, and this call has none: pass `prompt`, not embeddings "
            "alone, or take a reward that looks at the picture only."
        )
    frames = 1 if session.x.ndim == 4 else FRAMES_EACH * session.x.shape[2]
    return Judge(reward, session.decoder(device), session.prompts, session.height * session.width * frames, device)

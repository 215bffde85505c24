"""Soft value-based decoding: at every level several children are tried, and one chosen by its value continues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig
from diffaccel.samplers.search.published import PublishedForm
from diffaccel.samplers.search.resampling import draw


@dataclass(frozen=True, kw_only=True)
class SVDD(PublishedForm, PathSearchConfig):
    """Soft value-based decoding in diffusion models (Li et al., arXiv 2408.08252), with ``r(x0)`` as the value.

    At every level each chain tries about ``K = (budget - tail) / (particles stages)`` children, rounded up or down so
    that the whole budget is spent, at least 2. It continues from ``argmax r(x0')``, or from one drawn from
    ``softmax(r / temperature)``. Latents ``(B, C, H, W)``.

    As published (``paper()``) it is one chain from one first noise, which is not scored.

    Args:
        particles: chains per picture.
        one_noise: whether a chain begins at one noise, and not at the best of as many as it tries at other levels,
            which have them instead.
        temperature: of the softmax; 0 takes the best child.
    """

    name: ClassVar[str] = "svdd"
    citation: ClassVar[str] = (
        "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding, "
        "arXiv 2408.08252"
    )

    younger: ClassVar[tuple[str, ...]] = (*PathSearchConfig.younger, "preset", "one_noise")
    published: ClassVar[dict[str, Any]] = {"particles": 1, "one_noise": True}

    particles: int = 4
    one_noise: bool = False
    temperature: float = 0.0

    def validate(self) -> None:
        super().validate()
        self.require_at_least(particles=1, temperature=0)

    def chains(self, search: Search) -> list[Chain]:
        begin = int(self.one_noise)
        tries = [
            [*counts[:begin], *carried(search, counts[begin:], begin)]
            for counts in self.tries(search, self.particles, one_noise=self.one_noise)
        ]
        search.used = {"tries": tries}
        return [svdd(search, chain, counts, self) for chain, counts in enumerate(tries)]


def carried(search: Search, counts: list[int], begin: int = 0) -> list[int]:
    """Return the tries of each level from ``begin`` on, where all children go on through those that are not scored.

    What the least of a run of levels leaves is tried at the last one, which is always scored.
    """
    runs: list[list[int]] = [[]]
    for stage, count in enumerate(counts, begin):
        runs[-1].append(count)
        if search.scores(stage) and stage < begin + len(counts) - 1:
            runs.append([])
    tried = [min(run) for run in runs for _ in run]
    if len(runs[-1]) == 1:
        tried[-1] += sum(counts) - sum(tried)
    return tried


def svdd(search: Search, chain: int, counts: list[int], config: SVDD) -> Chain:
    """Run one chain: ``x = x_i`` with ``i ~ softmax(r(x0_i) / temperature)`` and ``x_i = K(x, z_i)``.

    There are ``counts`` of the ``x_i``, one number a level. ``K`` is the plan's kernel, such as ``alpha' x0 +
    sqrt(sigma'^2 - gamma^2) eps + gamma z``, and temperature 0 takes the argmax (arXiv 2408.08252, algorithm 1).
    """
    scores = search.scores(0) and not config.one_noise
    children = yield [search.start(chain, i, score=scores) for i in range(counts[0])]
    for stage in range(search.plan.stages):
        if stage == 0 and config.one_noise:
            score = search.scores(1)
            children = yield [search.propose(children[0], i, score=score) for i in range(counts[1])]
            continue
        if not search.scores(stage):
            children = yield [search.propose(p, i, score=search.scores(stage + 1)) for i, p in enumerate(children)]
            continue
        state = children[draw([p.reward for p in children], config.temperature, search.seed, chain, stage)]
        search.note(chain=chain, stage=stage, tried=counts[stage], reward=state.reward)
        if stage < search.plan.stages - 1:
            score = search.scores(stage + 1)
            children = yield [search.propose(state, i, score=score) for i in range(counts[stage + 1])]
    return (yield from search.finish([state]))

"""A population of plans whose mean losses and seconds are known, for tests and simulations of the tuner.

A plan's loss on a prompt is ``L(plan) exp(s z - s^2 / 2)``: log-normal around the known mean ``L``, with a part of
``z`` that all plans share, since prompts differ in how hard they are. What the gate calls SSIM is one minus the loss.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from diffaccel.config import Config, SamplerConfig
from diffaccel.eval.comparison.gate import parse
from diffaccel.eval.tuning.bed import Part, Refused
from diffaccel.eval.tuning.certificate import certify
from diffaccel.eval.tuning.choice import choose
from diffaccel.eval.tuning.halving import PlanEntry, Sizes, TuningSearch
from diffaccel.eval.tuning.journal import Journal
from diffaccel.eval.tuning.rule import Promise
from diffaccel.eval.tuning.space import TuningSpace
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.runs.variant import Variant

STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Drift(Config):
    """A cache whose loss has a cliff at a threshold of 0.4."""

    name: ClassVar[str] = "drift"
    touches: ClassVar[Any] = "blocks"
    conflicts: ClassVar[tuple[str, ...]] = ("echo",)
    threshold: float = 0.2

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"threshold": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}


@dataclass(frozen=True, kw_only=True)
class Echo(Config):
    """A cache that every k-th step refreshes."""

    name: ClassVar[str] = "echo"
    touches: ClassVar[Any] = "blocks"
    every: int = 2
    order: int = 1

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"every": (2, 3, 4, 5), "order": (2, 1, 0)}


@dataclass(frozen=True, kw_only=True)
class Coarse(SamplerConfig):
    """A loop that begins at a lower resolution."""

    name: ClassVar[str] = "coarse"
    share: float = 0.2

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"share": (0.1, 0.2, 0.3, 0.4, 0.5)}


@dataclass(frozen=True, kw_only=True)
class Halved(Config):
    """Weights of half the size."""

    name: ClassVar[str] = "halved"
    touches: ClassVar[Any] = "weights"
    keep: int = 2

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"keep": (4, 2, 0)}


@dataclass(frozen=True, kw_only=True)
class Bent(Config):
    """A method that runs on no pipeline."""

    name: ClassVar[str] = "bent"
    touches: ClassVar[Any] = "blocks"
    amount: int = 1

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"amount": (1, 2)}


METHODS = {cls.name: cls for cls in (Drift, Echo, Coarse, Halved, Bent)}


@dataclass
class ToyBed:
    """Draws from the population; its clock is that of the plans' own seconds.

    Attributes:
        seed: of the population and its prompts.
        spread: standard deviation of the logarithm of a loss.
        jitter: of the logarithm of a timed call.
        drawn: parts that were drawn, for tests.
    """

    seed: int = 0
    spread: float = 0.7
    jitter: float = 0.03
    drawn: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(f"population {self.seed}")
        self.scale = {key: math.exp(rng.gauss(0, 0.4)) for key in ("steps", "drift", "echo", "coarse", "halved")}

    def loss(self, plan: Variant) -> float:
        """Return the mean loss of a plan over all prompts."""
        steps = plan.call.get("steps", STEPS)
        loss = 0.01 * self.scale["steps"] * ((STEPS / steps) ** 2 - 1)
        for config in plan.methods:
            if config.name == "drift":
                loss += self.scale["drift"] * (0.05 * config.threshold + 0.3 * (config.threshold > 0.35))
            elif config.name == "echo":
                loss += self.scale["echo"] * 0.012 * (config.every - 1) ** 1.5 * (1, 0.6, 0.8)[config.order]
            elif config.name == "coarse":
                loss += self.scale["coarse"] * 0.15 * config.share**1.3
            elif config.name == "halved":
                loss += self.scale["halved"] * (0.004, 0.006, 0.01)[2 - config.keep // 2]
        return loss * (1 + 0.3 * max(0, len(plan.methods) - 1))

    def seconds(self, plan: Variant) -> float:
        """Return the expected seconds of a plan's call."""
        steps = plan.call.get("steps", STEPS)
        step = 0.05
        for config in plan.methods:
            step *= {
                "drift": lambda c: 1 / (1 + 2 * c.threshold),
                "echo": lambda c: (1 + 0.1 * (c.every - 1)) / c.every,
                "coarse": lambda c: 1 - 0.7 * c.share,
                "halved": lambda c: 0.8,
            }[config.name](config)
        return 0.1 + steps * step

    def baseline(self) -> Variant:
        """Return the plain plan."""
        return Variant((), {"steps": STEPS})

    def baseline_values(self) -> dict[str, float]:
        """Return the SSIM of the baseline to itself, and its seconds."""
        return {"ssim": 1.0, "seconds": self.seconds(self.baseline()), "speedup": 1.0}

    def evaluate(self, plan: Variant, part: Part) -> dict[str, Any]:
        """Draw the losses of a part."""
        if any(config.name == "bent" for config in plan.methods):
            raise Refused("no pipeline is straight enough")
        self.drawn.append(f"{plan.name} on {part.name}")
        mean, values = self.loss(plan), []
        for i in range(part.start, part.stop):
            shared = random.Random(f"{self.seed} {part.prompts} {i}").gauss(0, 1)
            own = random.Random(f"{self.seed} {part.prompts} {i} {plan.name}").gauss(0, 1)
            z = math.sqrt(0.6) * shared + math.sqrt(0.4) * own
            values.append(1 - mean * math.exp(self.spread * z - self.spread**2 / 2))
        count = part.stop - part.start
        seconds = self._calls(plan, part.name, count)
        base = self._calls(self.baseline(), f"{part.name} {plan.name}", 1)
        ratio = median(base) / median(seconds)
        cost = {"nfe": float(plan.call.get("steps", STEPS)), "peak_memory": 0.0}
        return {"values": {"ssim": values}, "cost": cost, "ratio": ratio, "spent": sum(seconds) + sum(base)}

    def take_turns(self, plans: list[Variant], turns: int, part: Part) -> dict[str, Any]:
        """Draw timings in turns."""
        label = f"turns {turns} {' '.join(plan.name for plan in plans)}"
        base = self._calls(self.baseline(), label, turns)
        timed = {}
        spent = sum(base)
        for plan in plans:
            own = self._calls(plan, label, turns)
            spent += sum(own)
            timed[plan.name] = {"seconds": median(own), "ratio": median_ratio(base, own).to_dict()}
        return {"plans": timed, "baseline": median(base), "spent": spent}

    def _calls(self, plan: Variant, label: str, count: int) -> list[float]:
        rng = random.Random(f"{self.seed} {label} {plan.name} seconds")
        return [self.seconds(plan) * math.exp(rng.gauss(0, self.jitter)) for _ in range(count)]


def search_on(
    bed: ToyBed,
    folder: Path,
    sizes: Sizes,
    *,
    rule: str = "ssim<0.9",
    nearness: str = "",
    methods: Any = None,
    seed: int = 0,
) -> TuningSearch:
    """Return a search on the population, in a folder's journal; ``nearness`` orders plans where the rule does not."""
    promise = Promise(parse(rule), bed.baseline_values())
    quality = Promise(parse(nearness), bed.baseline_values()) if nearness else promise
    space = TuningSpace.of(METHODS if methods is None else methods, STEPS)
    metrics = (*promise.gate.metrics, *quality.gate.metrics)
    journal = Journal(folder, {"population": bed.seed, "rule": rule, "seed": seed}, metrics)
    return TuningSearch(space, bed, promise, quality, journal, sizes, seed)


def tuning_on(search: TuningSearch) -> tuple[dict[str, PlanEntry], dict[str, dict[str, Any]]]:
    """Run a search, choose and certify; return the chosen plans and their certificates."""
    search.run()
    chosen = choose(search)
    return chosen, certify(search, chosen)

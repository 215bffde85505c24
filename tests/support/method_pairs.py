"""The table of pairs: every two methods compose on one pipeline, or refuse each other by name in one sentence."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import mixdq_bed
import tiny
import torch
from self_contracts import CHANGING
from torch import Tensor

import diffaccel
from diffaccel import registry
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import CacheDiT, Scheduler

_CACHE_DIT = CacheDiT(warmup=1, threshold=1e6)
EXAMPLES = {config.name: config for config in (*CHANGING.values(), Scheduler(guidance_stop=0.5), _CACHE_DIT)}
METHODS = list(registry.METHODS)
PAIRS = list(itertools.combinations(METHODS, 2))
LOOPS = {name for name, config in EXAMPLES.items() if config.touches == "loop"}
CACHES = {name for name, config in EXAMPLES.items() if config.touches == "blocks"}
BY_PATTERN = {"spectrum", "taylorseer"}  # caches whose steps look at no data
KEEPS = {"euler", "tib", "fused_blocks"}  # whose picture of this pipeline is the stock one
COUNTS_STEPS = {"cache_dit": {"euler", "dpmpp2m", "ancestral", "scheduler"}}  # counts network calls itself


def composes(first: str, second: str) -> bool:
    """Return whether two methods of ``EXAMPLES`` are meant to compose."""
    loop, cache = sorted((first, second), key=lambda name: name in CACHES)
    if loop in CACHES or cache in LOOPS:
        return False
    if cache in COUNTS_STEPS:
        return loop in COUNTS_STEPS[cache]
    if getattr(EXAMPLES[loop], "searches", False):
        return loop in ("bon", "drafts") and cache in BY_PATTERN
    return True


def config_of(name: str) -> Any:
    """Return the config of a method in this table: an example, its default, or one with a plan of this pipeline."""
    if name == "mixdq":
        return mixdq_bed.uniform("flux")
    return EXAMPLES[name] if name in EXAMPLES else registry.config_class(name)()


def outcome(first: str, second: str) -> dict[str, str]:
    """Put two methods on a pipeline, in both orders, and run it.

    Returns:
        The ``cell``: "yes" where both are active, draw the same picture twice and leave nothing behind; "refused" for a
        sentence with both names; "-" where one of them is refused alone; "no" for all else. ``why`` says it.
    """
    pipe, stock = _pipeline() if "cache_dit" not in (first, second) else _new_pipeline()
    if alone := _alone(first) or _alone(second):
        return {"cell": "-", "why": alone}
    results: list[Tensor] = []
    for names in ((first, second), (second, first)):
        try:
            diffaccel.accelerate(pipe, *map(config_of, names))
            active = {method["name"] for method in diffaccel.summary(pipe).methods}
            results.append(_drawn(pipe))
        except DiffAccelError as error:
            names_both = all(f"'{name}'" in str(error) for name in names)
            return {"cell": "refused" if names_both and not results else "no", "why": str(error)}
        finally:
            diffaccel.remove(pipe)
        if active != {first, second} or not torch.equal(_drawn(pipe), stock):
            return {"cell": "no", "why": f"{sorted(active)} were active, or the stock picture did not come back"}
    is_fine = torch.equal(*results) and bool(torch.isfinite(results[0]).all())
    is_fine = is_fine and torch.equal(results[0], stock) == ({first, second} <= KEEPS)
    return {"cell": "yes" if is_fine else "no", "why": "" if is_fine else "the order changes the picture"}


@functools.cache
def _pipeline() -> tuple[Any, Tensor]:
    return _new_pipeline()


def _new_pipeline() -> tuple[Any, Tensor]:
    pipe = tiny.make("flux")
    return pipe, _drawn(pipe)


@functools.cache
def _alone(name: str) -> str:
    """Return why a method is refused alone, "" where it is not."""
    pipe, _ = _new_pipeline()
    try:
        diffaccel.accelerate(pipe, config_of(name))
        _drawn(pipe)
    except DiffAccelError as error:
        return str(error)
    finally:
        diffaccel.remove(pipe)
    return ""


def _drawn(pipe: Any) -> Tensor:
    images: Tensor = pipe(**tiny.call_kwargs("flux")).images
    return images.clone()

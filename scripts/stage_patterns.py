"""Patterns of real steps, stage by stage: found on a model whose pictures can be judged, replayed on one that is large.

A pattern is a variant whose stages end at told steps and whose cache has told real steps, so that it is the same on
every model and looks at no data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.runs.variant import Variant, parse
from diffaccel.samplers import Bottleneck
from diffaccel.samplers.bottleneck.presets import PRESETS
from diffaccel.samplers.bottleneck.stages import bounds


def by_stage(real: Sequence[int]) -> list[list[int]]:
    """Return a list of real steps, in which each 0 begins a stage, as one list a stage."""
    begins = [*(place for place, step in enumerate(real) if step == 0), len(real)]
    return [list(real[first:last]) for first, last in pairwise(begins)]


def stage_steps(variant: Variant) -> list[tuple[float, int]]:
    """Return the scale and the number of steps of every stage that a variant names.

    Raises:
        DiffAccelError: for a variant without a number of steps, and stages that end elsewhere on another model.
    """
    steps = variant.call.get("steps")
    if steps is None:
        raise DiffAccelError(f"'{variant.name}' names no number of steps, and a pattern has one. Add steps=50.")
    staged = next((config for config in variant.methods if isinstance(config, Bottleneck)), None)
    if staged is None:
        return [(1.0, steps)]
    options = PRESETS.get(staged.preset, {})
    switches = staged.switches or options.get("switches")
    if switches is None:
        raise DiffAccelError(
            f"The stages of '{variant.name}' end where the model's own noise levels and spectrum say. Name "
            "bottleneck.switches, the shares of the steps after which they end."
        )
    scales = staged.scales or options["scales"]
    ends = bounds(steps, switches)
    return [(scale, last - first) for scale, (first, last) in zip(scales, pairwise(ends), strict=True)]


def told(variant: Variant, caches: dict[str, Any]) -> Variant:
    """Return a variant whose cache has the real steps that a run's record names; itself without a cache.

    Of guidance branches that differ, those of the first one are taken.
    """
    patterns = caches.get("real_steps")
    if not patterns:
        return variant
    real = tuple(next(iter(patterns.values())))
    methods = tuple(
        replace(config, real_steps=real) if hasattr(config, "real_steps") else config for config in variant.methods
    )
    return Variant(methods, variant.call)


def described(variant: Variant) -> list[dict[str, Any]]:
    """Return scale, steps and real steps of each stage of a pattern."""
    stages = stage_steps(variant)
    real = next((config.real_steps for config in variant.methods if getattr(config, "real_steps", None)), None)
    parts = [list(range(steps)) for _, steps in stages] if real is None else by_stage(real)
    if len(parts) == 1:
        parts *= len(stages)
    if len(parts) != len(stages) or any(part[-1] >= steps for part, (_, steps) in zip(parts, stages, strict=True)):
        raise DiffAccelError(
            f"'{variant.name}' has real steps {parts} for stages of {[steps for _, steps in stages]} steps. Give each "
            "stage a list from its step 0 on."
        )
    return [{"scale": scale, "steps": steps, "real": part} for (scale, steps), part in zip(stages, parts, strict=True)]


def read(path: Path, target: str, steps: int) -> Variant:
    """Return the pattern that a record of ``scripts.bench_pattern`` chose for a model.

    Raises:
        DiffAccelError: for a record without one, and another number of steps than the model's call makes.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    chosen = record.get("targets", {}).get(target, {}).get("chosen")
    if not chosen:
        known = [name for name, entry in record.get("targets", {}).items() if entry.get("chosen")]
        raise DiffAccelError(
            f"'{path}' has no pattern for '{target}'; it has some for {known}. Make one: python -m "
            f"scripts.bench_pattern --targets {target}."
        )
    pattern = parse(chosen["variant"])
    if pattern.call["steps"] != steps:
        raise DiffAccelError(
            f"The pattern in '{path}' has {pattern.call['steps']} steps, and '{target}' makes {steps}."
        )
    return pattern

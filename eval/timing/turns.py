"""How much faster: variants that take turns on one pipeline, so that what else a machine does meets all alike.

Every turn calls each variant once, in alternating order; the ratio to the first one is the median over turns with its
bootstrap interval. A call is the whole pipeline call: text encoders, network, decoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

from diffaccel import record
from diffaccel.compose import accelerate, remove, summary
from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.runs import generate as sampling
from diffaccel.runs import request as requests
from diffaccel.runs.call_arguments import call_arguments, frame_rate
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

FORMAT = 1
WARM_UP = 3
Then = Callable[[list[Any], list[str | None]], None]  # must have finished when it returns, on a GPU as well


def take_turns(
    pipe: Any,
    request: Request,
    variants: Sequence[Variant],
    *,
    turns: int = 10,
    warm_up: int = WARM_UP,
    then: Mapping[str, Then] = MappingProxyType({}),
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time ``variants`` on an open pipeline; the first one is the baseline.

    Args:
        pipe: on its device, without methods.
        request: its first chunk is what every call draws.
        variants: two or more; methods are put on before a call and taken off after it, outside of its time.
        turns: timed calls of each.
        warm_up: calls of each before the first turn; the first of them is reported as ``first_call_seconds``, and
            putting its methods on as ``set_up_seconds``: converted weights, calibration.
        then: by a variant's name, what else belongs to its call, given the pictures and prompts; its time is added.
        progress: told what is running.

    Returns:
        JSON-ready: ``variants``, a dict each with ``seconds`` of every turn, ``seconds_per_image`` (median), ``parts``,
        ``steps``, ``nfe``, ``peak_memory``, ``energy_joules`` a picture (None where NVML gives none) and, but for the
        first, ``ratio`` with its 95 % interval.

    Raises:
        DiffAccelError: for fewer than two variants or turns, two of one name, or a pipeline with methods on it.
    """
    names = [variant.name for variant in variants]
    if len(variants) < 2 or turns < 2 or warm_up < 1:
        raise DiffAccelError(
            f"Timing needs at least 2 variants, 2 turns and 1 warm-up call; got {len(variants)}, {turns} and {warm_up}."
        )
    if len(set(names)) < len(names):
        raise DiffAccelError(f"'{next(n for n in names if names.count(n) > 1)}' is there twice. Take one out.")
    if summary(pipe).methods:
        raise DiffAccelError("The pipeline has methods on it already. Call diffaccel.remove(pipe) first.")
    pipe.set_progress_bar_config(disable=True)
    entries: dict[str, dict[str, Any]] = {name: {"seconds": [], "costs": [], "joules": []} for name in names}
    for turn in range(-warm_up, turns):
        progress(f"warm-up {turn + warm_up + 1} of {warm_up}" if turn < 0 else f"turn {turn + 1} of {turns}")
        for variant in variants if turn % 2 else reversed(variants):
            cost, joules = one_call(pipe, variant.of(request), then.get(variant.name))
            entry = entries[variant.name]
            if turn < 0:
                entry.setdefault("first_call_seconds", cost["seconds"])
                entry.setdefault("set_up_seconds", cost.get("set_up"))
                continue
            entry["seconds"].append(cost["seconds"])
            entry["costs"].append(cost)
            entry["joules"].append(joules)
    images = len(request.chunks()[0])
    return {
        "format": FORMAT,
        "made": record.now(),
        "versions": record.versions(),
        "device": record.describe_device(pipe.device),
        "images_a_call": images,
        "turns": turns,
        "variants": [
            {"name": v.name, "folder": v.folder, "drawn": _drawn(v.of(request), pipe)}
            | _entry(entries[v.name], entries[names[0]], images)
            for v in variants
        ],
    }


def one_call(pipe: Any, request: Request, then: Then | None = None) -> tuple[dict[str, Any], float | None]:
    """What the first chunk of a request cost on an open pipeline, its methods put on for it; and joules."""
    request = request.with_model_defaults()
    start = time.perf_counter()
    if request.methods:
        accelerate(pipe, *request.methods)
        _wait(pipe.device)
    set_up = time.perf_counter() - start
    try:
        call = call_arguments(pipe, request)
        before = _joules(pipe.device)
        chunk = request.chunks()[0]
        made, cost, _ = sampling.generate_chunk(pipe, chunk, call, frame_rate(pipe, request))
        if then is not None:
            start = time.perf_counter()
            then(made, [item.prompt for item in chunk])
            cost["seconds"] += time.perf_counter() - start
        after = _joules(pipe.device)
        cost["set_up"] = set_up
    finally:
        remove(pipe)
    return cost, None if before is None or after is None else after - before


def _drawn(request: Request, pipe: Any) -> dict[str, Any]:
    """How a variant draws, as the record of a run of it has it: the run may have any name."""
    settings = request.with_model_defaults().settings("", pipe.device, pipe.dtype)
    return {key: settings[key] for key in requests.WAY}


def _entry(timed: dict[str, Any], base: dict[str, Any], images: int) -> dict[str, Any]:
    costs, seconds = timed["costs"], timed["seconds"]
    joules = [j for j in timed["joules"] if j is not None]
    found = {
        "turns": len(seconds),
        "seconds": seconds,
        "seconds_per_image": median(seconds) / images,
        "first_call_seconds": timed["first_call_seconds"],
        "set_up_seconds": timed["set_up_seconds"],
        "parts": {part: round(median(cost["parts"][part] for cost in costs), 5) for part in costs[0]["parts"]},
        "steps": [round(median(times), 6) for times in zip(*(cost["steps"] for cost in costs), strict=False)],
        "nfe": costs[0]["nfe"] / images,
        "peak_memory": max((cost["peak_memory"] or 0 for cost in costs), default=0) or None,
        "energy_joules": median(joules) / images if joules else None,
    }
    if timed is not base:
        ratio = median_ratio(base["seconds"], seconds)
        found["ratio"] = {
            "value": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "method": ratio.method,
            "significant": ratio.significant,
        }
    return found


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _joules(device: Any) -> float | None:
    """Energy that the GPU has used so far, by NVML; None where it does not say."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # not installed, or a card that has no counter
        return None

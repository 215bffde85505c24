"""Timing in turns: variants alternate on one pipeline, so that other load on the machine meets all of them alike.

Every turn calls each variant once, in alternating order; the speed-up over the first one is the median ratio over turns
with the interval of order statistics, from 6 turns on. A call is the whole pipeline call: text encoders, network,
decoder. Where energy is asked for, a call too short for the meter is repeated within its turn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from types import MappingProxyType
from typing import Any

import torch

from diffaccel import record
from diffaccel.compose import accelerate, remove, summary
from diffaccel.errors import DiffAccelError
from diffaccel.eval.timing.pace import Pace
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.eval.uncertainty.turns import energy_ratio
from diffaccel.files import COUNT, NUMBER, misfit
from diffaccel.runs.call_arguments import call_arguments, frame_rate
from diffaccel.runs.chunk import generate_chunk
from diffaccel.runs.energy import joules
from diffaccel.runs.request import WAY, Request
from diffaccel.runs.variant import Variant

FORMAT = 1
WARM_UP = 3
_ENTRY = {
    "name": str, "folder": str, "turns": COUNT, "seconds": [NUMBER], "seconds_per_image": NUMBER,
    "first_call_seconds": NUMBER, "set_up_seconds?": (NUMBER, None), "parts": record.PARTS, "steps": [NUMBER],
    "peak_memory?": (NUMBER, None), "peaks?": ([NUMBER], None), "energy_joules?": (NUMBER, None),
    "joules?": ([NUMBER], None), "metered_seconds?": (NUMBER, None), "drawn?": dict,
}  # fmt: skip
_TIMING = {"format?": COUNT, "images_a_call": COUNT, "turns": COUNT, "device": {"type": str}, "variants": [_ENTRY]}
AfterCall = Callable[[list[Any], list[str | None]], None]  # must have finished when it returns, on a GPU as well


def take_turns(
    pipe: Any,
    request: Request,
    variants: Sequence[Variant],
    *,
    turns: int = 10,
    warm_up: int = WARM_UP,
    meter_seconds: float = 0.0,
    after_call: Mapping[str, AfterCall] = MappingProxyType({}),
    progress: Callable[[str], None] = lambda text: None,
    spares: bool = False,
    expected: Mapping[str, float] = MappingProxyType({}),
    begun: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda state: None,
) -> dict[str, Any]:
    """Time ``variants`` on an open pipeline; the first one is the baseline.

    Args:
        pipe: on its device, without methods.
        request: its first chunk is what every call draws.
        variants: two or more; methods are put on before a call and taken off after it, outside of its time.
        turns: timed calls of each.
        warm_up: calls of each before the first turn; the first of them is reported as ``first_call_seconds``, and
            putting its methods on as ``set_up_seconds``: converted weights, calibration.
        meter_seconds: that a reading of energy spans at least, by calls one after the other whose time counts no more
            than the first's; 20 ticks of the meter give it an interval. Without a meter nothing is repeated.
        after_call: by a variant's name, a function of the pictures and prompts that belongs to its call; its time is
            added.
        progress: called with a line of text before every round of calls, and before a long call.
        spares: leave out calls on a CPU that tell little: second warm-up calls of 5 s and more, and of ways that take
            20 s and five times as long as the baseline all calls but two timed ones, which give no interval.
        expected: seconds of a call by a variant's name, for an estimate before the first one.
        begun: what ``keep`` was given by a call that was stopped: its turns count.
        keep: called after every turn with the turns so far, JSON-ready.

    Returns:
        JSON-ready: ``variants``, a dict each with ``seconds`` of every turn, ``seconds_per_image`` (median), ``parts``,
        ``steps``, ``nfe``, ``peak_memory`` (highest) and ``peaks`` of every turn in bytes, ``energy_joules`` a picture
        (mean), ``joules`` of a call in every turn (None where NVML gives none), ``metered_seconds`` that these readings
        span (median) and, but for the first, ``ratio`` of times and
        ``energy_ratio`` with their 95 % intervals, null for too few turns.

    Raises:
        DiffAccelError: for fewer than two variants or turns, two of one name, or a pipeline with methods on it.
    """
    _check(pipe, variants, turns, warm_up)
    pipe.set_progress_bar_config(disable=True)
    names = [variant.name for variant in variants]
    calls, made = _calls_so_far(names, begun)
    pace = Pace(names, turns, warm_up, spares=spares and pipe.device.type == "cpu", expected=expected)
    for turn in [*range(-warm_up, 0), *range(made, turns)] if made < turns else ():
        progress(pace.text(turn))
        for variant in variants if turn % 2 else reversed(variants):
            variant_calls = calls[variant.name]
            if len(variant_calls["seconds"]) < max(turn, made) or not pace.is_due(variant.name, turn):
                continue  # what was left out once is left out for good: turns are pairs
            if announcement := pace.announcement(variant.name):
                progress(announcement)
            span = meter_seconds if turn >= 0 else 0.0
            cost, joules = one_call(pipe, variant.of(request), after_call.get(variant.name), meter_seconds=span)
            pace.took(variant.name, cost["seconds"])
            variant_calls.setdefault("first_call_seconds", cost["seconds"])
            variant_calls.setdefault("set_up_seconds", cost.get("set_up"))
            if turn < 0:
                continue
            variant_calls["seconds"].append(cost["seconds"])
            variant_calls["costs"].append(cost)
            variant_calls["joules"].append(joules)
        if turn >= 0:
            keep({"calls": calls, "turns": turn + 1})
    images, base_calls = len(request.chunks()[0]), calls[variants[0].name]
    return {
        "format": FORMAT,
        "made": record.now(),
        "versions": record.versions(),
        "device": record.describe_device(pipe.device),
        "images_a_call": images,
        "turns": turns,
        "variants": [
            {"name": variant.name, "folder": variant.folder, "drawn": _drawn_settings(variant.of(request), pipe)}
            | _entry(calls[variant.name], base_calls, images)
            for variant in variants
        ],
    }


def _calls_so_far(names: Sequence[str], begun: Mapping[str, Any] | None) -> tuple[dict[str, dict[str, Any]], int]:
    """Return by a variant's name what its calls cost, and the number of turns that are made."""
    if begun is None:
        return {name: {"seconds": [], "costs": [], "joules": []} for name in names}, 0
    return {name: copy.deepcopy(begun["calls"][name]) for name in names}, begun["turns"]


def _check(pipe: Any, variants: Sequence[Variant], turns: int, warm_up: int) -> None:
    names = [variant.name for variant in variants]
    if len(variants) < 2 or turns < 2 or warm_up < 1:
        raise DiffAccelError(
            f"Timing needs at least 2 variants, 2 turns and 1 warm-up call; got {len(variants)}, {turns} and {warm_up}."
        )
    if len(set(names)) < len(names):
        raise DiffAccelError(f"'{next(n for n in names if names.count(n) > 1)}' is there twice. Take one out.")
    if summary(pipe).methods:
        raise DiffAccelError("The pipeline has methods on it already. Call diffaccel.remove(pipe) first.")


def check_timing(timing: Any, file: str | Path) -> dict[str, Any]:
    """Return the timing that was read from a file.

    Raises:
        DiffAccelError: when it lacks a part or has one of another kind, naming the first.
    """
    if isinstance(timing, dict):
        record.check_format(timing, FORMAT, f"The timing '{file}'")
    if part := misfit(timing, _TIMING) if isinstance(timing, dict) else "all of it":
        raise DiffAccelError(
            f"'{file}' is no timing of diffaccel eval time, or a damaged one: {part} is missing or no such value. Make "
            "it again."
        )
    return timing


def one_call(
    pipe: Any, request: Request, after_call: AfterCall | None = None, *, meter_seconds: float = 0.0
) -> tuple[dict[str, Any], float | None]:
    """Call an open pipeline once, its methods put on for it, and return what the call cost.

    Args:
        pipe: without methods.
        request: its first chunk is drawn.
        after_call: belongs to the call, and its time is added.
        meter_seconds: that the reading of energy spans at least; the call is repeated until then where there is one.

    Returns:
        The cost as :func:`diffaccel.runs.generate.generate_chunk` has it, with seconds of putting the methods on as
        ``set_up`` and those that the reading spans as ``metered``; and joules a call, None where NVML gives none.
    """
    request = request.with_model_defaults()
    start = time.perf_counter()
    if request.methods:
        accelerate(pipe, *request.methods)
        _wait(pipe.device)
    set_up = time.perf_counter() - start
    try:
        arguments, chunk = call_arguments(pipe, request), request.chunks()[0]
        before, begin, calls = joules(pipe.device), time.perf_counter(), 1
        cost = _timed_call(pipe, chunk, arguments, request, after_call)
        while before is not None and time.perf_counter() - begin < meter_seconds:
            _timed_call(pipe, chunk, arguments, request, after_call)
            calls += 1
        after = joules(pipe.device)
        cost |= {"set_up": set_up, "metered": max(cost["seconds"], time.perf_counter() - begin)}
    finally:
        remove(pipe)
    return cost, None if before is None or after is None else (after - before) / calls


def _timed_call(
    pipe: Any, chunk: Any, arguments: dict[str, Any], request: Request, after_call: AfterCall | None
) -> dict[str, Any]:
    """Return the cost of one call, with the time of what belongs to it."""
    pictures, cost, _ = generate_chunk(pipe, chunk, arguments, frame_rate(pipe, request))
    if after_call is not None:
        start = time.perf_counter()
        after_call(pictures, [item.prompt for item in chunk])
        cost["seconds"] += time.perf_counter() - start
    return cost


def _drawn_settings(request: Request, pipe: Any) -> dict[str, Any]:
    """Return how a variant draws, as the record of its run has it: a run of any name is matched by these settings."""
    settings = request.with_model_defaults().settings("", pipe.device, pipe.dtype)
    return {key: settings[key] for key in WAY}


def _entry(calls: dict[str, Any], base_calls: dict[str, Any], images: int) -> dict[str, Any]:
    """Summarise the calls of one variant; all but the baseline have a ratio of the baseline's seconds to their own."""
    costs, seconds = calls["costs"], calls["seconds"]
    used = None if None in calls["joules"] else calls["joules"]
    peaks = [cost["peak_memory"] for cost in costs if cost["peak_memory"]]
    entry = {
        "turns": len(seconds),
        "seconds": seconds,
        "seconds_per_image": median(seconds) / images,
        "first_call_seconds": calls["first_call_seconds"],
        "set_up_seconds": calls["set_up_seconds"],
        "parts": {part: round(median(cost["parts"][part] for cost in costs), 5) for part in costs[0]["parts"]},
        "steps": [round(median(times), 6) for times in zip(*(cost["steps"] for cost in costs), strict=False)],
        "nfe": costs[0]["nfe"] / images,
        "peak_memory": max(peaks, default=None),
        "peaks": peaks if len(peaks) == len(costs) else None,
        "energy_joules": fmean(used) / images if used else None,
        "joules": used,
        "metered_seconds": _metered(calls) if used else None,
    }
    if calls is not base_calls:
        entry["ratio"] = median_ratio(base_calls["seconds"][: len(seconds)], seconds).to_dict()
        metered = (_metered(calls), _metered(base_calls))
        if (ratio := energy_ratio(used, base_calls["joules"], metered)) is not None:
            entry["energy_ratio"] = ratio.to_dict()
    return entry


def _metered(calls: dict[str, Any]) -> float:
    """Return the seconds that a reading of energy spans."""
    return median(cost["metered"] for cost in calls["costs"])


def _wait(device: Any) -> None:
    """Wait until the device has finished everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

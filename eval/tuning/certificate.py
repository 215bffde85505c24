"""The certificate of plans: tests on held-out prompts, in a fixed order, the safest plan first.

The order is set before a held-out prompt is drawn, and the tests end with the first plan that fails: the chance that
any certified plan breaks the promise is then that of a single test (fixed sequence testing, arXiv 2110.01052).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffaccel.eval.tuning.choice import turns_of
from diffaccel.eval.tuning.halving import PlanEntry, TuningSearch
from diffaccel.eval.tuning.rule import Judgement, Promise, Samples, too_few, with_timing


def certify(search: TuningSearch, chosen: Mapping[str, PlanEntry]) -> dict[str, dict[str, Any]]:
    """Test plans on the held-out prompts in their order, up to the first that fails.

    Plans that turn out no faster than the baseline are left out before a held-out picture is looked at.

    Returns:
        By name, in that order: ``keeps``, ``why`` not, ``count`` of prompts, ``measures``: by metric, its value and
        interval, and ``timing``: seconds a picture, the baseline's, and the speed-up with its interval.
    """
    if not chosen:
        return {}
    timing = turns_of(search, list(chosen.values()), search.sizes.turns, "certificate")
    times = {
        name: {**timing["plans"][entry.name], "baseline_seconds": timing["baseline"]} for name, entry in chosen.items()
    }
    certificates: dict[str, dict[str, Any]] = {
        name: {"keeps": False, "why": f"in turns it is not surely faster: {times_text(time['ratio'])}", "timing": time}
        for name, time in times.items()
        if not is_faster(time)
    }
    for name, entry in chosen.items():
        if name in certificates:
            continue
        time = times[name]
        samples = search.held_out(entry)
        if samples is None:
            certificates[name] = {"keeps": False, "why": "it was refused on a held-out prompt", "timing": time}
            break
        certificates[name] = certificate(search.promise, search.quality, samples, time, search.seed)
        if not certificates[name]["keeps"]:
            break
    return certificates


def times_text(ratio: Mapping[str, Any]) -> str:
    """Return a speed-up with its interval in words."""
    ends = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{ratio['value']:.2f} times as fast{ends}"


def is_faster(timing: Mapping[str, Any]) -> bool:
    """Return whether a timing in turns shows that a plan is faster than the baseline."""
    ratio = timing["ratio"]
    return (ratio["value"] if ratio["low"] is None else ratio["low"]) > 1


def certificate(
    promise: Promise, quality: Promise, samples: Samples, timing: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Return what held-out samples and a timing in turns prove of one plan."""
    samples = with_timing(samples, timing)
    judged = promise.judge(samples, seed=seed)
    readings = {**quality.judge(samples, seed=seed).readings, **judged.readings}
    few = too_few(judged)
    return {
        "keeps": judged.keeps and not few,
        "why": "" if judged.keeps and not few else _why(judged, few),
        "count": samples.count,
        "level": promise.level,
        "measures": {name: dict(zip(("value", "low", "high"), r.ends, strict=True)) for name, r in readings.items()},
        "timing": dict(timing),
    }


def _why(judged: Judgement, few: bool) -> str:
    if few:
        return "too few held-out prompts for a verdict"
    withheld = [f"{name}: {reading.why}" for name, reading in judged.readings.items() if reading.why]
    if withheld:
        return withheld[0]
    ends = [f"{name} {r.value:.4g} ({r.low:.4g} to {r.high:.4g})" for name, r in judged.readings.items()]
    return f"on held-out prompts, {', '.join(ends)}"

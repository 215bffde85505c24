"""Verdicts: one word for a row of ``report.json``, and one for a run.

``better`` and ``worse``: the 95 % interval of the paired difference to the baseline excludes 0, and the metric's
direction says which. ``same``: every picture is equal to the bit, or the interval holds 0 and stays inside
:func:`same_margin`, what other seeds would do to a mean over 1,000 prompts. ``not shown``: none of these is proven, as
with fewer than 10 prompts. A distance to the baseline's own pictures has no word: being far from them is neither better
nor worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from diffaccel.eval.comparison.row import BY_PROMPT, digits
from diffaccel.eval.uncertainty.intervals import too_few
from diffaccel.eval.uncertainty.student import student_quantile

Row = Mapping[str, Any]  # of report.json
BETTER, WORSE, SAME, NOT_SHOWN, MIXED = "better", "worse", "same", "not shown", "better and worse"
WORDS = (BETTER, WORSE, SAME, NOT_SHOWN, MIXED)
EXPLAINED = (
    f"{BETTER}, {WORSE}: the 95 % interval of the paired difference to the baseline excludes 0. "
    f"{SAME}: every picture is equal to the bit, or the interval holds 0 and stays inside what other seeds would do to "
    f"a mean over 1,000 prompts. "
    f"{NOT_SHOWN}: neither. A distance to the baseline's own pictures is no quality and has no word."
)
ONE_COLOUR = "one_colour"  # in a row's detail: pictures that show nothing, as a run draws that broke down
COUNTED = ("nfe", "forwards", "flops")  # numbers without uncertainty
RATIOS = ("speedup", "energy_ratio")  # to the baseline's
MARGIN_PROMPTS = 1000  # over which other seeds' effect on a mean is the margin of "same"


def word(row: Row) -> str:
    """Return the verdict of a row in a word; "" for what has none, as distances to the baseline's pictures."""
    if row.get("identical"):
        return SAME
    if row["family"] == "cost":
        return _word_of_cost(row)
    interval, delta = row.get("delta_interval"), row.get("delta")
    if interval is None:
        return "" if delta is None else NOT_SHOWN
    if few_prompts(row):
        return NOT_SHOWN
    shown = word_of_difference(interval["low"], interval["high"], row["better"])
    return SAME if shown == NOT_SHOWN and _inside_margin(interval, row) else shown


def word_of_difference(low: float, high: float, better: str) -> str:
    """Return the verdict of a difference by its interval and the better side, "higher" or "lower"."""
    if low <= 0 <= high:
        return NOT_SHOWN
    return BETTER if (low > 0) == (better == "higher") else WORSE


def few_prompts(row: Row) -> str:
    """Return the sentence that takes the place of a verdict from too few prompts; "" where there are enough."""
    interval = row.get("delta_interval") or row.get("interval")
    if row["family"] not in BY_PROMPT or interval is None:
        return ""
    return too_few(interval.get("units"))


def floor(row: Row) -> tuple[float | None, tuple[float, float] | None]:
    """Return what other seeds of the baseline do: a number, and its interval where the report has one."""
    value = row.get("floor")
    interval = row.get("floor_interval") or (value if isinstance(value, Mapping) else None)
    if isinstance(value, Mapping):
        value = value.get("value")
    ends = None if interval is None else (interval.get("low"), interval.get("high"))
    return value, None if ends is None or None in ends else ends  # type: ignore[return-value]


def noise_interval(row: Row) -> tuple[float, float] | None:
    """Return the interval of other seeds' difference to the baseline; None where the floor is no difference."""
    return floor(row)[1] if row["family"] in BY_PROMPT and row.get("delta") is not None else None


def same_margin(row: Row) -> float | None:
    """Return how far from 0 a difference may lie and be the same; None where other seeds were not measured.

    It is what other seeds would do to a mean over 1,000 prompts: ``1.96 s / sqrt(1000)``, some 6 % of the deviation
    ``s`` of what another seed changes in the score of one prompt. So it is a property of the model, and few prompts do
    not widen it as they widen the interval of other seeds. ``s`` is read from the shorter arm of that interval of ``n``
    prompts, ``s = arm sqrt(n) / t`` with Student's ``t`` of ``n - 1`` degrees.

    Simulated (``python -m scripts.bench_coverage --part same``), a true change of half of what seeds do to ``n``
    prompts is called the same in at most 0.8 % of 500 samples at ``n`` = 10, 30 and 100.
    """
    value, ends = floor(row)
    units = (row.get("floor_interval") or {}).get("units")
    if value is None or ends is None or noise_interval(row) is None or not units or units < 2:
        return None
    arm = max(0.0, min(value - ends[0], ends[1] - value))
    by_chance = student_quantile(0.975, units - 1)
    return arm * NormalDist().inv_cdf(0.975) / by_chance * math.sqrt(units / MARGIN_PROMPTS)


def run_word(rows: Sequence[Row]) -> str:
    """Return the verdict of a run on quality, from the rows of its main measures."""
    if any(row.get("identical") and row["metric"] == "psnr" for row in rows):
        return SAME
    words = {word(row) for row in rows if row["family"] not in ("cost", "fidelity")} - {""}
    if any((row.get("detail") or {}).get(ONE_COLOUR) for row in rows):
        return WORSE if WORSE in words else NOT_SHOWN  # a network may well like a blank picture
    if {BETTER, WORSE} <= words:
        return MIXED
    return next((w for w in (WORSE, BETTER, NOT_SHOWN, SAME) if w in words), NOT_SHOWN)


def ruined_text(row: Row, things: str) -> str:
    """Return how many of a row's pictures are of one colour, where their pairs in the baseline are not; "" for none."""
    count = (row.get("detail") or {}).get(ONE_COLOUR)
    return f"{count} of its {things} of one colour, which the baseline's are not" if count else ""


def number(row: Row, value: float | None, sign: str = "") -> str:
    """Return a value of a row as text, with the places of its metric; "" for none."""
    if value is None:
        return ""
    places = ".4g" if row["metric"] == "flops" else f"z.{digits(row['metric'])}f"  # z: no -0.000
    return f"{value:{sign}{places}}"


def ends(row: Row, interval: Mapping[str, Any] | None, sign: str = "") -> str:
    """Return the ends of an interval as text; "" for none.

    Where 0 is outside, an end that would round to 0 shows its first digit.
    """
    if interval is None:
        return ""
    low, high = interval["low"], interval["high"]

    def text(end: float) -> str:
        rounded = number(row, end, sign)
        return rounded if low <= 0 <= high or float(rounded) != 0 else f"{end:{sign}.1g}"

    return f"{text(low)} to {text(high)}"


def _word_of_cost(row: Row) -> str:
    if row["metric"] in RATIOS:
        interval = row.get("interval")
        if interval is None:
            return "" if row.get("value") is None else NOT_SHOWN
        return word_of_difference(interval["low"] - 1, interval["high"] - 1, row["better"])
    delta, apart = row.get("delta"), row.get("delta_interval")
    if apart is not None:
        shown = word_of_difference(apart["low"], apart["high"], row["better"])
        return SAME if apart["low"] == apart["high"] == 0 else shown
    if row["metric"] not in COUNTED or delta is None:
        return ""
    return SAME if delta == 0 else BETTER if (delta > 0) == (row["better"] == "higher") else WORSE


def _inside_margin(interval: Mapping[str, Any], row: Row) -> bool:
    if interval["low"] == interval["high"] == 0:
        return True
    margin = same_margin(row)
    return margin is not None and max(-interval["low"], interval["high"]) <= margin

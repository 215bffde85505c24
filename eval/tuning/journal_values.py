"""What the values that a tuning's journal keeps must have, so that an edited or damaged one is told by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffaccel.errors import shortened

SETTINGS = "settings"
_RESULT = re.compile(r".* on (tuning|held-out)-(\d+)-(\d+)", re.DOTALL)  # the key of a plan's result on a part
_TURNS = re.compile(r"turns of the .*", re.DOTALL)
_TIMED = ("seconds", "speedup")  # metrics that come from the ratio


def _is_number(value: Any) -> bool:
    """Return whether a value is a number; the PSNR of equal pictures is infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a number": _is_number,
    "a number above 0": _is_positive,
    "a number above 0 or null": lambda value: value is None or _is_positive(value),
    "a number, 0 or more": lambda value: _is_number(value) and 0 <= value < math.inf,
    "a whole number, 0 or more": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "a text": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "an object of numbers": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "an object of texts": lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
}
_FIXED = {
    SETTINGS: "an object", "call seconds": "a number above 0", "warm seconds": "a number above 0",
    "brackets": "a whole number, 0 or more", "chosen": "an object of texts",
}  # fmt: skip


def damage(values: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Return what is wrong with the first value that is not as a tuning puts it; empty where all are.

    Args:
        values: by key, as they were read.
        metrics: of the gate, each of which every result must have.
    """
    return next((text for key, value in values.items() for text in _of_value(key, value, metrics)), "")


def _of_value(key: str, value: Any, metrics: Sequence[str]) -> Iterator[str]:
    if key in _FIXED:
        yield from wrong(value, f"'{key}'", _FIXED[key])
        return
    result = _RESULT.fullmatch(key)
    if result is None and not _TURNS.fullmatch(key):
        if isinstance(value, dict) and "spent" in value:
            yield from _part(value, "spent", f"'{key}'", "a number, 0 or more")
        return
    if problems := list(wrong(value, f"'{key}'", "an object")):
        yield from problems
        return
    yield from _part(value, "spent", f"'{key}'", "a number, 0 or more")
    if result is None:
        yield from _of_turns(key, value)
    elif value.get("refused"):
        yield from _part(value, "refused", f"'{key}'", "a text")
    else:
        yield from _of_result(key, value, result[1] == "tuning", int(result[3]) - int(result[2]), metrics)


def _of_result(key: str, value: dict[str, Any], tuning: bool, count: int, metrics: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with what was measured of a plan on ``count`` prompts."""
    yield from _part(value, "ratio", f"'{key}'", "a number above 0" if tuning else "a number above 0 or null")
    yield from _part(value, "cost", f"'{key}'", "an object of numbers")
    if problems := list(_part(value, "values", f"'{key}'", "an object")):
        yield from problems
        return
    for metric, numbers in value["values"].items():
        if not isinstance(numbers, list) or len(numbers) != count or not all(map(_is_number, numbers)):
            yield f"'{metric}' in values of '{key}' is {_short(numbers)}, and must be a list of {count} numbers"
    known = {*value["values"], *(value.get("cost") or ()), *_TIMED}
    yield from (f"'{m}' in values of '{key}' is missing, and the gate names it" for m in metrics if m not in known)


def _of_turns(key: str, value: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a timing in turns."""
    yield from _part(value, "baseline", f"'{key}'", "a number above 0")
    if problems := list(_part(value, "plans", f"'{key}'", "an object")):
        yield from problems
        return
    for name, timing in value["plans"].items():
        place = f"'{name}' in '{key}'"
        problems = list(wrong(timing, place, "an object")) or list(_part(timing, "ratio", place, "an object"))
        yield from problems
        if not problems:
            yield from _part(timing, "seconds", place, "a number above 0")
            yield from _part(timing["ratio"], "value", f"the ratio of {place}", "a number above 0")
            yield from _ends(timing["ratio"], f"the ratio of {place}")


def _ends(ratio: dict[str, Any], place: str) -> Iterator[str]:
    """Yield what is wrong with the ends of an interval: both are numbers, or neither."""
    problems = [text for end in ("low", "high") for text in _part(ratio, end, place, "a number above 0 or null")]
    yield from problems
    if not problems and (ratio["low"] is None) != (ratio["high"] is None):
        yield f"one end of {place} is null, and both or neither must be"


def _part(values: dict[str, Any], name: str, place: str, kind: str) -> Iterator[str]:
    if name not in values:
        yield f"{name} of {place} is missing, and must be {kind}"
    else:
        yield from wrong(values[name], f"{name} of {place}", kind)


def wrong(value: Any, place: str, kind: str) -> Iterator[str]:
    """Yield that a value is not of a kind, where it is not."""
    if not _KINDS[kind](value):
        yield f"{place} is {_short(value)}, and must be {kind}"


def _short(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 60, 30)

"""A condition on metrics that fails a build: ``lpips > 0.05 or clip_score < -0.3``.

Clauses are ``METRIC OP NUMBER`` with ``>``, ``>=``, ``<`` or ``<=``, joined by ``and`` and ``or``; ``and`` binds
tighter, parentheses group. Metric names may carry their network: ``clip_score[ViT-L-14/openai]``, ``FD-tiny@1a2b3c4d``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from diffaccel.errors import DiffAccelError, unknown

OPERATORS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    ">": (operator.gt, "above"),
    ">=": (operator.ge, "at or above"),
    "<": (operator.lt, "below"),
    "<=": (operator.le, "at or below"),
}
_TOKEN = re.compile(
    r"\s*(?:(?P<op>[<>]=?)|(?P<paren>[()])|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])"
    r"|(?P<name>[^\W\d](?:[\w.@/:+-]|\[[^\[\]]*\])*))"
)


@dataclass(frozen=True)
class Clause:
    """One comparison of a metric with a number."""

    metric: str
    op: str
    number: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` makes it true."""
        return OPERATORS[self.op][0](value, self.number)

    def sentence(self, value: float) -> str:
        """What was found, in words."""
        word = OPERATORS[self.op][1]
        got, limit = f"{value:.6g}", f"{self.number:.6g}"
        if got == limit and value != self.number:
            got, limit = repr(value), repr(self.number)
        return f"{self.metric} is {got}, {word if self.holds(value) else f'not {word}'} {limit}."


@dataclass(frozen=True)
class Joined:
    """Conditions joined by "and" or "or"."""

    word: Literal["and", "or"]
    parts: tuple[Condition, ...]


Condition = Clause | Joined


@dataclass(frozen=True)
class Gate:
    """A parsed condition that must not hold.

    Attributes:
        text: as it was given.
        condition: the tree of its clauses.
    """

    text: str
    condition: Condition

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics it needs, each once."""
        return tuple(dict.fromkeys(clause.metric for clause in _clauses(self.condition)))

    def check(self, values: Mapping[str, float | None]) -> tuple[bool, list[str]]:
        """``(failed, sentences)``: whether the condition holds, and a sentence on every clause.

        Every metric must have a value, also where another clause alone would decide: a gate that could not be
        measured must not look like one that passed. ``inf`` is a value (the PSNR of identical images).

        Raises:
            DiffAccelError: for a metric that is not in ``values``, or has no value there.
        """
        found: dict[str, float] = {}
        for name in self.metrics:
            if name not in values:
                raise unknown("metric", name, values)
            value = values[name]
            if value is None or math.isnan(value):
                raise DiffAccelError(
                    f"'{name}' has no value, so '{self.text}' cannot be checked. Measure it, or leave it out."
                )
            found[name] = float(value)
        sentences = [clause.sentence(found[clause.metric]) for clause in _clauses(self.condition)]
        return _holds(self.condition, found), sentences


def parse(text: str) -> Gate:
    """The gate that a text says.

    Raises:
        DiffAccelError: for anything else than clauses joined by ``and`` and ``or``, saying where.
    """
    reader = _Reader(text)
    condition = _either(reader)
    if reader.kind != "end":
        raise reader.error("'and', 'or' or the end")
    return Gate(text, condition)


class _Reader:
    """The tokens of a text, one at a time."""

    def __init__(self, text: str) -> None:
        self.text, self.start, self.end = text, 0, 0
        self.kind, self.value = "", ""
        self.advance()

    def advance(self) -> str:
        """Move to the next token, and return the one before."""
        before = self.value
        match = _TOKEN.match(self.text, self.end)
        rest = self.text[self.end :]
        self.start = self.end + len(rest) - len(rest.lstrip())
        if match is not None and match.lastgroup is not None:
            self.kind, self.value, self.end = match.lastgroup, match[match.lastgroup], match.end()
            if self.kind == "name" and self.value.lower() in ("and", "or"):
                self.kind = self.value.lower()
        elif not rest.strip():
            self.kind, self.value = "end", ""
        else:
            self.kind, self.value = "other", rest.split()[0]
        return before

    def error(self, wanted: str) -> DiffAccelError:
        got = "the end" if self.kind == "end" else f"'{self.value}'"
        return DiffAccelError(
            f"The gate '{self.text}' wants {wanted} at character {self.start + 1}, got {got}. "
            "Write it like lpips>0.05 or clip_score<-0.3."
        )


def _either(reader: _Reader) -> Condition:
    parts = [_all(reader)]
    while reader.kind == "or":
        reader.advance()
        parts.append(_all(reader))
    return parts[0] if len(parts) == 1 else Joined("or", tuple(parts))


def _all(reader: _Reader) -> Condition:
    parts = [_one(reader)]
    while reader.kind == "and":
        reader.advance()
        parts.append(_one(reader))
    return parts[0] if len(parts) == 1 else Joined("and", tuple(parts))


def _one(reader: _Reader) -> Condition:
    if reader.value == "(":
        reader.advance()
        inner = _either(reader)
        if reader.value != ")":
            raise reader.error("')'")
        reader.advance()
        return inner
    if reader.kind != "name":
        raise reader.error("a metric")
    metric = reader.advance()
    if reader.kind != "op":
        raise reader.error("one of >, >=, <, <=")
    op = reader.advance()
    if reader.kind != "number":
        raise reader.error("a number")
    return Clause(metric, op, float(reader.advance()))


def _clauses(condition: Condition) -> Iterator[Clause]:
    if isinstance(condition, Clause):
        yield condition
        return
    for part in condition.parts:
        yield from _clauses(part)


def _holds(condition: Condition, values: Mapping[str, float]) -> bool:
    if isinstance(condition, Clause):
        return condition.holds(values[condition.metric])
    return (any if condition.word == "or" else all)(_holds(part, values) for part in condition.parts)

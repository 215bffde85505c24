"""A condition on metrics that fails a build: ``lpips > 0.05 or clip_score < -0.3``.

Clauses are ``METRIC OP NUMBER`` with ``>``, ``>=``, ``<`` or ``<=``, joined by ``and`` and ``or``; ``and`` binds
tighter, parentheses group. Metric names may carry their network: ``clip_score[ViT-L-14/openai]``, ``FD-tiny@1a2b3c4d``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from diffaccel.errors import DiffAccelError, unknown

if TYPE_CHECKING:
    from diffaccel.eval.comparison.result import Comparison

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
    """Comparison of one metric with a number."""

    metric: str
    op: str
    number: float

    def holds(self, value: float) -> bool:
        """Return whether ``value`` makes the clause true."""
        return OPERATORS[self.op][0](value, self.number)

    def sentence(self, value: float, *, is_difference: bool = False) -> str:
        """Return in words how ``value`` compares with the number; a difference to the baseline is called one."""
        word = OPERATORS[self.op][1]
        value_text, limit = f"{value:.6g}", f"{self.number:.6g}"
        if value_text == limit and value != self.number:
            value_text, limit = repr(value), repr(self.number)
        name = f"{self.metric}, less the baseline's," if is_difference else self.metric
        return f"{name} is {value_text}, {word if self.holds(value) else f'not {word}'} {limit}."


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
        text: as it was written.
        condition: tree of its clauses.
    """

    text: str
    condition: Condition

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that it needs, each once."""
        return tuple(dict.fromkeys(clause.metric for clause in _clauses(self.condition)))

    def check(
        self, values: Mapping[str, float | None], *, reasons: Mapping[str, str] | None = None,
        differences: Container[str] = (),
    ) -> tuple[bool, list[str]]:  # fmt: skip
        """Return whether the condition holds, which fails the build, and a sentence on every clause.

        Every metric must have a value, also where another clause alone would decide: a gate that could not be
        measured must not look like one that passed. ``inf`` is a value (the PSNR of identical images).

        Args:
            values: by metric, the number that is compared.
            reasons: by metric, why it has no value.
            differences: names of the metrics whose numbers are differences to the baseline.

        Raises:
            DiffAccelError: for a metric that is not in ``values``, or has no value there.
        """
        numbers: dict[str, float] = {}
        for name in self.metrics:
            if name not in values:
                raise unknown("metric", name, values)
            value = values[name]
            if value is None or math.isnan(value):
                why = f" ({reason})" if (reason := (reasons or {}).get(name)) else ""
                raise DiffAccelError(
                    f"'{name}' has no value{why}, so '{self.text}' cannot be checked. Measure it, or leave it out."
                )
            numbers[name] = float(value)
        sentences = [
            clause.sentence(numbers[clause.metric], is_difference=clause.metric in differences)
            for clause in _clauses(self.condition)
        ]
        return _holds(self.condition, numbers), sentences


def parse(text: str) -> Gate:
    """Parse the text of a gate.

    Raises:
        DiffAccelError: for anything else than clauses joined by ``and`` and ``or``, saying where, and for clauses
            joined by ``and`` that never hold together.
    """
    tokens = _Tokens(text)
    condition = _parse_or(tokens)
    if tokens.kind != "end":
        raise tokens.error("'and', 'or' or the end")
    return Gate(text, condition)


def check_runs(gate: Gate | None, comparison: Comparison) -> tuple[bool, list[str]]:
    """Return whether the gate fails for any run of a comparison, and a sentence on every clause and run.

    Raises:
        DiffAccelError: for a metric that was not measured.
    """
    failed, sentences = False, []
    for run in comparison.runs if gate is not None else ():
        fails, clauses = gate.check(  # type: ignore[union-attr]
            comparison.gate_values(run.name),
            reasons=comparison.reasons(run.name), differences=comparison.gate_differences(run.name),
        )  # fmt: skip
        failed |= fails
        sentences += [f"{run.name}: {'FAILED' if fails else 'passed'}: {sentence}" for sentence in clauses]
    return failed, sentences


class _Tokens:
    """Tokens of a text, read one at a time."""

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


def _parse_or(tokens: _Tokens) -> Condition:
    parts = [_parse_and(tokens)]
    while tokens.kind == "or":
        tokens.advance()
        parts.append(_parse_and(tokens))
    return parts[0] if len(parts) == 1 else Joined("or", tuple(parts))


def _parse_and(tokens: _Tokens) -> Condition:
    parts = [_parse_clause(tokens)]
    while tokens.kind == "and":
        tokens.advance()
        parts.append(_parse_clause(tokens))
    if len(parts) == 1:
        return parts[0]
    both = Joined("and", tuple(parts))
    if not any(_cases(both)):
        text = " and ".join(_text(part) for part in parts)
        raise DiffAccelError(
            f"The gate '{tokens.text}' asks for '{text}', which no number is, so that nothing would ever fail it. Join "
            "the two by 'or', or correct a number."
        )
    return both


def _parse_clause(tokens: _Tokens) -> Condition:
    if tokens.value == "(":
        tokens.advance()
        inner = _parse_or(tokens)
        if tokens.value != ")":
            raise tokens.error("')'")
        tokens.advance()
        return inner
    if tokens.kind != "name":
        raise tokens.error("a metric")
    metric = tokens.advance()
    if tokens.kind != "op":
        raise tokens.error("one of >, >=, <, <=")
    op = tokens.advance()
    if tokens.kind != "number":
        raise tokens.error("a number")
    if not math.isfinite(float(tokens.value)):  # no value lies beyond it: the clause would hold always, or never
        raise tokens.error("a number below 1.8e308")
    return Clause(metric, op, float(tokens.advance()))


def _clauses(condition: Condition) -> Iterator[Clause]:
    """Yield the clauses of a condition in the order of its text."""
    if isinstance(condition, Clause):
        yield condition
        return
    for part in condition.parts:
        yield from _clauses(part)


def _cases(condition: Condition) -> Iterator[dict[str, _Range]]:
    """Yield the cases in which a condition holds, each by metric the range of its numbers."""
    if isinstance(condition, Clause):
        yield {condition.metric: _Range.of(condition)}
    elif condition.word == "or":
        for part in condition.parts:
            yield from _cases(part)
    else:
        for parts in product(*(tuple(_cases(part)) for part in condition.parts)):
            ranges: dict[str, _Range] = {}
            for metric, one in (item for part in parts for item in part.items()):
                ranges[metric] = ranges[metric].within(one) if metric in ranges else one
            if not any(one.is_empty for one in ranges.values()):
                yield ranges


@dataclass(frozen=True)
class _Range:
    """Numbers between two ends.

    Attributes:
        low: an end, and whether it is left out: the greater pair leaves out more.
        high: an end, and whether it is in the range: the lesser pair leaves out more.
    """

    low: tuple[float, bool] = (-math.inf, False)
    high: tuple[float, bool] = (math.inf, True)

    @classmethod
    def of(cls, clause: Clause) -> _Range:
        is_open = len(clause.op) == 1
        end = (clause.number, is_open) if clause.op[0] == ">" else (clause.number, not is_open)
        return cls(low=end) if clause.op[0] == ">" else cls(high=end)

    def within(self, other: _Range) -> _Range:
        return _Range(max(self.low, other.low), min(self.high, other.high))

    @property
    def is_empty(self) -> bool:
        (low, is_open), (high, is_closed) = self.low, self.high
        return low > high or (low == high and (is_open or not is_closed))


def _text(condition: Condition) -> str:
    if isinstance(condition, Clause):
        return f"{condition.metric}{condition.op}{condition.number:g}"
    return "(" + f" {condition.word} ".join(map(_text, condition.parts)) + ")"


def _holds(condition: Condition, values: Mapping[str, float]) -> bool:
    if isinstance(condition, Clause):
        return condition.holds(values[condition.metric])
    return (any if condition.word == "or" else all)(_holds(part, values) for part in condition.parts)

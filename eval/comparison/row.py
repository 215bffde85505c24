"""Parts of a report: a row is a measured number of one run and its uncertainty, a section a table beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from diffaccel.eval.uncertainty.intervals import Interval, too_few

Family = Literal["fidelity", "video", "alignment", "distribution", "cost"]
Better = Literal["lower", "higher"]
DIGITS = {
    "psnr": 2, "ssim": 4, "latent_error": 4, "lpips": 4, "clip_i": 4, "clip_score": 2, "seconds": 4, "speedup": 2,
    "nfe": 1, "forwards": 1, "first_call": 4, "psnr_drift": 4, "ssim_drift": 5,
}  # fmt: skip

BOUNDS = {  # of the mean of a metric; others have none
    "psnr": (0.0, math.inf), "ssim": (-1.0, 1.0), "lpips": (0.0, math.inf), "latent_error": (0.0, math.inf),
    "clip_i": (-1.0, 1.0), "clip_score": (0.0, 100.0), "clip_score_w2.5": (0.0, 250.0), "flicker": (0.0, 255.0),
    "precision": (0.0, 1.0), "recall": (0.0, 1.0), "density": (0.0, math.inf), "coverage": (0.0, 1.0),
}  # fmt: skip
FEW_CARRIERS = 5  # that carry a spread: a reader must know of fewer
LEAST_TO_WITHHOLD = 30  # prompts; one alone that carries the spread of so many gives no interval
BY_PROMPT = ("fidelity", "video", "alignment")  # families whose intervals are over prompts


def without_lone_carrier(
    interval: Interval | None, part: str = "the spread"
) -> tuple[Interval | None, str, int | None]:
    """Return an interval, a note and the count of what carries its spread, where these are few; else "" and None.

    Where it is one alone of 30 or more, there is no interval: what rarer ones do cannot be seen.
    """
    if interval is None or not interval.carriers or not interval.units or interval.carriers >= FEW_CARRIERS:
        return interval, "", None
    count = math.ceil(interval.carriers - 0.5)
    note = f"{count} of {interval.units} {'carries' if count == 1 else 'carry'} {part}"
    if interval.units >= LEAST_TO_WITHHOLD and count == 1:
        return None, f"{note}, too few for an interval", count
    return interval, note, count


def within_bounds(metric: str, interval: Interval | None, *, is_difference: bool = False) -> Interval | None:
    """Cut an interval to the values that a metric, or a difference of two of them, can have at all."""
    if interval is None or metric not in BOUNDS:
        return interval
    least, most = BOUNDS[metric]
    if is_difference:
        least, most = least - most, most - least
    low, high = min(max(interval.low, least), interval.value), max(min(interval.high, most), interval.value)
    return replace(interval, low=low, high=high)


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval if it has one, a note for the reader, and what else belongs to it."""

    value: float
    interval: Interval | None = None
    note: str = ""
    detail: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(kw_only=True)
class Row:
    """A metric's value for a run, with its uncertainty.

    Attributes:
        metric: short name, as ``--fail-if`` takes it: ``lpips``, ``clip_score``, ``fd``.
        key: full name with the network behind it: ``clip_score[emoji-clip-judge]``, ``FD-tiny@1a2b3c4d``.
        family: the question that the metric answers.
        run: the run's name.
        value: the number; None where it could not be measured (``missing`` says why) or is infinite (``identical``).
        interval: 95 % interval of ``value``.
        delta: difference to the baseline's value, with its own interval from paired data.
        floor: the noise floor: the metric between the baseline and itself with other seeds; of a score that every
            picture has by itself, the score of other seeds minus the baseline's, paired by prompt.
        floor_interval: 95 % interval of ``floor``.
        n, m: pictures that the value is of, and of what it was compared with; of times, the timed calls.
        better: which direction is better.
        unit: of the value and its difference.
        identical: whether every pair is equal to the bit.
        missing: reason for which there is no value.
        detail: protocol, extractor's sha256, method of the interval, and whatever else belongs to the number;
            ``carried_by`` and ``delta_carried_by`` where few prompts carry the spread, see :meth:`set_interval`.
    """

    metric: str
    key: str
    family: Family
    run: str
    better: Better
    value: float | None = None
    interval: Interval | None = None
    delta: float | None = None
    delta_interval: Interval | None = None
    floor: float | None = None
    floor_interval: Interval | None = None
    n: int | None = None
    m: int | None = None
    unit: str = ""
    identical: bool = False
    missing: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def set_interval(self, name: Literal["interval", "delta_interval"], interval: Interval | None) -> None:
        """Set an interval over prompts, and say in ``detail`` how many of them carry its spread where they are few.

        Where it is one alone of 30 or more, its count stands for the interval: what rarer ones do cannot be seen.
        """
        part = "the spread" if name == "interval" else "the spread of the difference"
        interval, note, count = without_lone_carrier(interval, part)
        if count is not None:
            self.detail["carried_by" if name == "interval" else "delta_carried_by"] = count
            self.add_note(note)
        setattr(self, name, within_bounds(self.metric, interval, is_difference=name == "delta_interval"))

    def set_floor(self, floor: Estimate, *, is_difference: bool = False) -> None:
        """Set what other seeds of the baseline do: a value of the metric, or a difference of two."""
        self.floor = floor.value
        self.floor_interval = within_bounds(self.metric, floor.interval, is_difference=is_difference)

    def add_note(self, note: str) -> None:
        """Add to what ``detail`` says of where the number comes from; once, and nothing for ""."""
        notes = [*filter(None, self.detail.get("from", "").split("; ")), *filter(None, [note])]
        if notes:
            self.detail["from"] = "; ".join(dict.fromkeys(notes))

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON-ready values: a missing or infinite number is null."""
        return {name: _json_ready(value) for name, value in asdict(self).items()}

    @property
    def too_few(self) -> str:
        """Sentence that takes the place of a verdict from fewer than 10 prompts; "" where there are enough."""
        if self.family not in BY_PROMPT or self.identical:
            return ""
        interval = self.delta_interval or self.interval
        if interval is None and "carried_by" in self.detail:  # withheld for one of 30 or more that carries it alone
            return ""
        return too_few(1 if interval is None else interval.units)

    @property
    def within_noise(self) -> bool | None:
        """Whether chance explains the difference to the baseline; None where that is not known: see ``too_few``.

        A value without a difference is beyond noise where it is worse than the floor and their intervals are apart.
        """
        if self.too_few:
            return None
        if self.delta_interval is not None:
            return not self.delta_interval.significant
        if "delta_carried_by" in self.detail or (self.interval is None and "carried_by" in self.detail):
            return None
        if self.value is None or self.floor is None:
            return None
        sign = 1 if self.better == "lower" else -1
        if sign * self.value <= sign * self.floor:
            return True
        if self.interval is None or self.floor_interval is None:
            return None
        own, floor = self.interval, self.floor_interval
        return own.low <= floor.high and floor.low <= own.high

    @property
    def gate_value(self) -> float | None:
        """The number that ``--fail-if`` compares: the difference to the baseline where there is one, else the value."""
        if self.identical and self.value is None:
            return math.inf  # the PSNR of pictures that are equal
        return self.value if self.delta is None else self.delta


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled table that a report shows beside its metrics.

    Attributes:
        key: its name in ``report.json``.
        title: as the page shows it.
        note: one or two sentences on what the table says and how it was measured.
        columns: heads of the columns.
        rows: cells as text, one for each column.
        data: the numbers behind the cells, JSON-ready.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values."""
        return {"title": self.title, "note": self.note, "columns": self.columns, "rows": self.rows, **self.data}


def digits(metric: str) -> int:
    """Return how many places after the point a metric is printed with."""
    return DIGITS.get(metric, 3)


def missing(metric: str, key: str, family: Family, run: str, better: Better, why: str) -> Row:
    """Return the row of a metric that could not be measured: it is named with the reason, never dropped."""
    return Row(metric=metric, key=key, family=family, run=run, better=better, missing=why)


def _json_ready(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(inner) for inner in value]
    return value

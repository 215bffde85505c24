"""First screen of a report: a row and a sentence for every run, from what is in ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.row import BY_PROMPT
from diffaccel.eval.comparison.verdict import Row
from diffaccel.eval.report.names import clean, short_names

DISTANCES = ("lpips", "ssim", "psnr")  # to the baseline's pictures; the first that there is stands in the summary
FRECHET = ("fd", "fvd")
MOST_SCORES = 3


@dataclass(frozen=True)
class Cell:
    """A number of a table as text: itself, its difference to the baseline, their intervals, a verdict and a note."""

    head: str
    value: str = ""
    interval: str = ""
    delta: str = ""
    delta_interval: str = ""
    word: str = ""
    note: str = ""

    @property
    def difference(self) -> str:
        """The difference with its interval in brackets."""
        return bracketed(self.delta, self.delta_interval)


@dataclass(frozen=True)
class RunSummary:
    """What the first screen says of a run.

    Attributes:
        run: its name.
        word: its verdict on quality.
        speed: its speed-up, with the interval.
        cells: its main measures, in the order of :func:`main_keys`.
        sentence: all of it in a sentence, without the run's name and a full stop.
    """

    run: str
    word: str
    speed: Cell
    cells: tuple[Cell, ...]
    sentence: str


def rows_of(report: Mapping[str, Any], run: str) -> dict[str, Row]:
    """Return the rows of a run by their full names."""
    return {row["key"]: row for row in report["metrics"] if row["run"] == run}


def compared_runs(report: Mapping[str, Any]) -> list[str]:
    """Return the names of the runs that were compared with the baseline."""
    return [run["name"] for run in report["runs"] if run["name"] != report["baseline"]]


def bracketed(value: str, interval: str) -> str:
    """Return a number with its interval in brackets, where it has one."""
    return f"{value} ({interval})" if interval else value


def counted_things(count: int, things: str) -> str:
    """Return a number of things in words: "2 pictures", "1 picture"."""
    return f"{count} {things.removesuffix('s') if count == 1 else things}"


def things_of(report: Mapping[str, Any]) -> str:
    """Return what the runs hold: "videos" or "pictures"."""
    return "videos" if any(row["family"] == "video" for row in report["metrics"]) else "pictures"


def main_keys(report: Mapping[str, Any]) -> list[str]:
    """Return the full names of the main measures: scores with a difference, a Fréchet distance, and one distance."""
    rows = [row for row in report["metrics"] if row["run"] != report["baseline"]]
    scores = [row["key"] for row in rows if row["family"] == "alignment" and row.get("delta") is not None]
    measured = [row for row in rows if row.get("value") is not None or row.get("identical")]
    frechet = [row["key"] for row in measured if row["metric"] in FRECHET][:1]
    distances = [row["key"] for metric in DISTANCES for row in measured if row["metric"] == metric][:1]
    return list(dict.fromkeys([*list(dict.fromkeys(scores))[:MOST_SCORES], *frechet, *distances]))


def summaries(report: Mapping[str, Any]) -> list[RunSummary]:
    """Return a summary of every run that was compared with the baseline."""
    keys = main_keys(report)
    names = short_names(row["key"] for row in report["metrics"])
    things = things_of(report)
    found = []
    for run in compared_runs(report):
        rows = rows_of(report, run)
        speedup = next((row for row in rows.values() if row["metric"] == "speedup"), None)
        main = [rows[key] for key in keys if key in rows]
        word = verdict.run_word([*main, *(row for row in rows.values() if row["metric"] == "psnr")])
        sentence = ", ".join([_speed_text(speedup), *_quality_texts(rows, main, names, things)])
        cells = tuple(cell(rows.get(key), key, things) for key in keys)
        found.append(RunSummary(run, word, _speed_cell(speedup), cells, sentence))
    return found


def headline(report: Mapping[str, Any]) -> str:
    """Return in a few words how much faster the runs are, and how many are better, worse or the same."""
    summary = summaries(report)
    speed = _speed_headline([row for row in report["metrics"] if row["metric"] == "speedup" and row.get("value")])
    if len(summary) == 1:
        return f"{speed.removesuffix(',')}, quality {summary[0].word}"
    words = [run.word for run in summary]
    counts = ", ".join(f"{w} in {words.count(w)}" for w in verdict.WORDS if w in words)
    return f"{speed.removesuffix(',')}; quality {counts} of {len(words)} runs"


def _speed_headline(rows: Sequence[Row]) -> str:
    """Return how fast runs are in a few words, which never say more than the intervals of their speed-ups."""
    if not rows:
        return "Speed not measured"
    unproven = [row for row in rows if row.get("interval") and verdict.word(row) == verdict.NOT_SHOWN]
    if len(unproven) == len(rows):
        return "Speed-up not shown"
    speeds = [row["value"] for row in rows if row not in unproven]
    low, high = (f"{end:.2f}x" for end in (min(speeds), max(speeds)))
    guess = ", without an interval," if not any(row.get("interval") for row in rows) else ""
    speed = f"{low} to {high} as fast" if low != high else f"{low} as fast"
    return f"{speed}{guess}" + (f", not shown in {len(unproven)}" if unproven else "")


def how_to_read(report: Mapping[str, Any]) -> str:
    """Return what the first screen's columns and words mean, of those that it has."""
    first = {row["key"]: row for row in reversed(report["metrics"]) if row["run"] != report["baseline"]}
    names = short_names(row["key"] for row in report["metrics"])
    columns: dict[str, list[str]] = {}
    for key in main_keys(report):
        arrow = "↓" if first[key]["better"] == "lower" else "↑"
        columns.setdefault(_kind_of_column(first[key], things_of(report)), []).append(f"{names[key]} {arrow}")
    shown = {word for run in summaries(report) for word in (run.word, *(c.word for c in run.cells))}
    proven = [word for word in (verdict.BETTER, verdict.WORSE) if word in shown]
    texts = ["Small print: 95 % intervals", *(f"{', '.join(heads)}: {kind}" for kind, heads in columns.items())]
    if proven:
        texts.append(f"{', '.join(proven)}: the interval leaves out 0")
    if verdict.SAME in shown:
        texts.append(f"{verdict.SAME}: the interval holds 0, within what other seeds do to 1,000 prompts")
    if verdict.NOT_SHOWN in shown:
        texts.append(f"{verdict.NOT_SHOWN}: not proven either way")
    return clean(". ".join(texts) + ".")


def _kind_of_column(row: Row, things: str) -> str:
    """Return what a main measure is compared with."""
    if row["metric"] in DISTANCES:
        equal = {"ssim": ", 1 is equal", "lpips": ", 0 is equal"}.get(row["metric"], "")
        return f"to the baseline's {things}{equal}"
    return "change from the baseline" if row.get("delta") is not None else f"distance between sets of {things}"


def verdicts(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the verdicts as ``report.json`` has them: run, word and sentence."""
    return [{"run": run.run, "word": run.word, "text": run.sentence} for run in summaries(report)]


def cell(row: Row | None, key: str, things: str) -> Cell:
    """Return a row as a cell."""
    if row is None:
        return Cell(key)
    value = "identical" if row.get("identical") else verdict.number(row, row.get("value"))
    has_unit = row.get("unit") and row.get("value") is not None and not row.get("identical")
    unit = f"{'' if row['unit'] == 'x' else ' '}{row['unit']}" if has_unit else ""
    interval = "" if row.get("identical") else verdict.ends(row, row.get("interval"))
    delta = verdict.number(row, row.get("delta"), "+")
    delta_interval = verdict.ends(row, row.get("delta_interval"), "+")
    note = verdict.few_prompts(row) or note_text(row, things)
    return Cell(key, value + unit, interval, delta, delta_interval, verdict.word(row), note)


def noise_text(row: Row) -> str:
    """Return what other seeds of the baseline do, as text; "" where that was not measured."""
    value, interval = verdict.floor(row)
    sign = "+" if verdict.noise_interval(row) is not None else ""
    text = verdict.number(row, value, sign)
    ends = "" if interval is None else verdict.ends(row, {"low": interval[0], "high": interval[1]}, sign)
    return f"{text} ({ends})" if text and ends else text or ends


def count_text(row: Row, things: str) -> str:
    """Return how many prompts, or else pictures or videos, stand behind a row."""
    units = (row.get("delta_interval") or row.get("interval") or {}).get("units")
    if units and row["family"] in BY_PROMPT:
        return f"{units} prompts"
    return counted_things(row["n"], things) if row.get("n") else ""


def note_text(row: Row, things: str) -> str:
    """Return why a number is missing, or where it comes from; "" for none."""
    detail = row.get("detail") or {}
    batch = f"{counted_things(detail['batch'], things)} in a call" if detail.get("batch") else ""
    return clean("; ".join(filter(None, (row.get("missing") or detail.get("from"), batch))))


def _speed_cell(row: Row | None) -> Cell:
    if row is None or row.get("value") is None:
        return Cell("speed-up", note=clean((row or {}).get("missing") or ""))
    interval = verdict.ends(row, row.get("interval"))
    turns = (row.get("detail") or {}).get("turns")
    note = "" if interval else f"{turns} turns, too few for an interval" if turns else "the runs' own clocks"
    return Cell("speed-up", f"{row['value']:.2f}x", interval, word=verdict.word(row), note=note)


def _speed_text(row: Row | None) -> str:
    if row is None or row.get("value") is None:
        return f"speed not measured ({row['missing']})" if row and row.get("missing") else "speed not measured"
    value, interval = row["value"], row.get("interval")
    if interval is None:
        turns = (row.get("detail") or {}).get("turns")
        source = f"{turns} turns, too few for an interval" if turns else "by the runs' own clocks, without an interval"
        return f"{value:.2f}x as fast ({source})"
    low, high = interval["low"], interval["high"]
    if low <= 1 <= high:
        return f"speed-up not shown ({value:.2f}x, {low:.2f} to {high:.2f})"
    if value > 1:
        return f"{value:.2f}x faster ({low:.2f} to {high:.2f})"
    return f"{1 / value:.2f}x slower ({1 / high:.2f} to {1 / low:.2f})"


def _quality_texts(rows: Mapping[str, Row], main: Sequence[Row], names: Mapping[str, str], things: str) -> list[str]:
    """Return what a sentence says of quality: differences by their verdicts, then the distance to the baseline."""
    if any(row.get("identical") and row["metric"] == "psnr" for row in rows.values()):
        return [f"pixel for pixel the baseline's {things}"]
    ruined = next((text for row in rows.values() if (text := verdict.ruined_text(row, things))), "")
    texts = [ruined] if ruined else []
    differences = [row for row in main if row.get("delta_interval")]
    for word in (verdict.BETTER, verdict.SAME, verdict.WORSE, verdict.NOT_SHOWN):
        group = [row for row in differences if verdict.word(row) == word]
        if group:
            texts.append(f"{_VERBS[word]} by {' and '.join(_difference_text(row, names, things) for row in group)}")
    distances = [row for row in rows.values() if row["metric"] in DISTANCES and row.get("value") is not None]
    if distances:
        values = ", ".join(_distance_text(row) for row in distances)
        texts.append(f"{values} to the baseline's {things}")
    return texts


_VERBS = {verdict.BETTER: "better", verdict.SAME: "same", verdict.WORSE: "worse", verdict.NOT_SHOWN: "no verdict"}


def _difference_text(row: Row, names: Mapping[str, str], things: str) -> str:
    interval = verdict.ends(row, row["delta_interval"], "+")
    reason = verdict.few_prompts(row) or count_text(row, things)
    return f"{names[row['key']]} ({verdict.number(row, row['delta'], '+')}, {interval}; {reason})"


def _distance_text(row: Row) -> str:
    unit = f" {row['unit']}" if row.get("unit") else ""
    name = row["key"] if row["metric"] != "lpips" else "LPIPS"
    return f"{name} {verdict.number(row, row['value'])}{unit}"

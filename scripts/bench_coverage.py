"""Measure by simulation how often intervals cover the truth, and how often tests and verdicts are wrong.

    python -m scripts.bench_coverage --out docs/results

Every row draws samples of ``n`` from a population that is known, and counts how often the interval of the package's own
function holds what it estimates. Populations are normal, skewed, and our own: the pairs of 1,000 prompts of a report
(``--report``), and features with the covariance of the 2,578 icons that emoji-flux was trained on. Parts named by
``--part`` take the place of those in a record that lies in ``--out`` already, row by row where only some of their rows
are asked for. Parts may so be simulated side by side, each into a folder of its own, which ``--join`` brings together.

``carriers`` is the number of values of a sample that carry the population's spread, ``n`` over its kurtosis: of
failures it is ``n`` times their rate, and of sets of features the median over samples. Below 5 of them most samples
have not seen what the mean depends on, and no interval of the sample can cover: such rows are marked, and promise
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffaccel import record
from diffaccel.eval.comparison import row as comparison_row
from diffaccel.eval.uncertainty.intervals import bootstrap_mean
from diffaccel.eval.uncertainty.sequential import Sequential
from scripts.coverage_of_features import FEATURES, FEW, Only, Row, distances, extrapolations, generator, holds, shares
from scripts.coverage_of_turns import ratios
from scripts.coverage_of_verdicts import called_same

Array = NDArray[np.float64]
REPORT = Path("docs/results/report_emoji-flux_steps/report.json")
NAME = "coverage_cpu.json"
COUNTS = {"mean": (10, 30, 100, 300, 1000), "failures": (30, 100, 300, 1000)}
LOOKS = {"64 to 1000": (64, 128, 256, 512, 1000), "16 and 32": (16, 32)}
HEADS = {
    "means": ("population", "n", "carriers", "coverage", "promised", "holds"),
    "ratios": ("number", "population", "turns", "coverage", "holds"),
    "distances": ("number", "features", "population", "n", "carriers", "coverage", "promised", "holds"),
    "extrapolation": ("number", "features", "population", "n", "carriers", "coverage", "promised", "holds"),
    "shares": ("number", "features", "population", "n", "coverage", "holds"),
    "early stop": ("population", "looks", "false", "holds", "tolerance", "pictures until proven equal", "proven"),
    "A against A": ("number", "population", "n", "beyond noise", "holds"),
    "same": ("number", "population", "n", "noise", "false", "holds", "no change"),
}


# -- populations ------------------------------------------------------------------------------------------------------


def pairs_of_report(file: Path) -> dict[str, Array]:
    """Return by name the values of every pair of a report: PSNR, SSIM, CLIP-I, and differences of the CLIP score."""
    report = json.loads(file.read_text())
    base, populations = report["baseline"], {}
    for key, by_run in report["pairs"].items():
        for run, numbers in by_run.items():
            if run == base or None in numbers:
                continue
            values = np.array(numbers)
            name = f"{key.partition('[')[0]}, {run.removeprefix('plain-')}"
            is_score = base in by_run
            populations[f"{name}, difference" if is_score else name] = values - by_run[base] if is_score else values
    return populations


def closed_forms(size: int = 200_000) -> dict[str, Array]:
    """Return large samples of distributions, which stand for the distributions."""
    draw = generator("populations")
    return {
        "normal": draw.normal(size=size), "uniform": draw.random(size), "exponential": draw.exponential(size=size),
        "lognormal, sigma 0.5": draw.lognormal(0, 0.5, size), "lognormal, sigma 1": draw.lognormal(0, 1, size),
    }  # fmt: skip


def carriers(population: Array, n: int) -> float:
    """Return how many of ``n`` values carry the spread: ``n`` over the kurtosis of the population."""
    squares = (population - population.mean()) ** 2
    return float(n * squares.mean() ** 2 / (squares * squares).mean())


# -- rows -------------------------------------------------------------------------------------------------------------


def means(populations: dict[str, Array], scale: float) -> Iterator[Row]:
    """Yield the coverage of means, of values and of paired differences alike."""
    cases = [(name, values, n) for name, values in populations.items() for n in COUNTS["mean"]]
    for n in COUNTS["failures"]:
        draw = generator("failures", n)
        for times in (5, 10):
            failures = 0.01 * draw.normal(size=400_000) - (draw.random(400_000) < times / n)
            cases.append((f"failures, n x rate = {times}", failures, n))
    yield from _of_prompts(populations, scale)
    for name, values, n in cases:
        repeats = max(50, int(scale * 750))
        draw, truth, covered = generator("means", name, n), float(values.mean()), 0
        for seed in range(repeats):
            interval = bootstrap_mean(values[draw.integers(0, len(values), n)], seed=seed)
            covered += interval.low <= truth <= interval.high
        few = carriers(values, n)
        yield {
            "population": name, "n": n, "carriers": round(few, 1), "coverage": covered / repeats,
            "promised": few >= FEW, "holds": holds(covered / repeats, repeats), "repeats": repeats,
        }  # fmt: skip


def _of_prompts(populations: dict[str, Array], scale: float) -> Iterator[Row]:
    """Yield the coverage of means over prompts with four seeds each, half of whose variance is the prompts' own."""
    repeats = max(50, int(scale * 750))
    for name in ("normal", "exponential"):
        values = populations[name] - populations[name].mean()
        few = carriers(values[:50_000] + values[50_000:200_000].reshape(3, -1).mean(0), 1)
        for n in (10, 30, 100):
            draw, covered, labels = generator("prompts", name, n), 0, np.repeat(np.arange(n), 4).tolist()
            for seed in range(repeats):
                own, seeds = (values[draw.integers(0, len(values), count)] for count in (n, 4 * n))
                interval = bootstrap_mean(np.repeat(own, 4) + seeds, clusters=labels, seed=seed)
                covered += interval.low <= 0 <= interval.high
            yield {
                "number": "means over prompts of four seeds", "population": name, "n": n, "carriers": round(few * n, 1),
                "coverage": covered / repeats, "promised": few * n >= FEW, "holds": holds(covered / repeats, repeats),
                "repeats": repeats,
            }  # fmt: skip


def early_stop(pairs: dict[str, Array], scale: float) -> Iterator[Row]:
    """Yield how often the test calls runs equivalent whose mean is at the tolerance, and how soon it proves what holds.

    The second part is of the same pairs at a tolerance that is 2.5 % of the metric's range above the mean difference.
    """
    draw = generator("ruined")
    ruined = np.where(draw.random(100_000) < 0.02, -0.9, draw.uniform(-1e-4, 0, 100_000))
    cases = {"2 % ruined, tiny noise": (ruined, (-2.0, 0.0))}
    for name, values in pairs.items():
        if name.startswith("SSIM"):
            cases[name] = (values - 1, (-2.0, 0.0))
        if name.startswith("clip_score"):
            cases[name] = (values, (-100.0, 100.0))
    for name, (values, bounds) in cases.items():
        for text, looks in LOOKS.items():
            repeats = max(30, int(scale * 1000))
            false = sum(
                _verdict(values, abs(float(values.mean())), looks, bounds, seed)[0] != "go on"
                for seed in range(repeats)
            )
            wide = abs(float(values.mean())) + 0.025 * (bounds[1] - bounds[0])
            ends = [_verdict(values, wide, looks, bounds, seed) for seed in range(max(30, repeats // 5))]
            proven = [n for verdict, n in ends if verdict == "equivalent"]
            yield {
                "population": name, "looks": text, "false": false / repeats, "holds": false / repeats <= 0.05,
                "pictures until proven equal": int(np.median(proven)) if proven else None,
                "proven": len(proven) / len(ends), "tolerance": round(wide, 3), "repeats": repeats,
            }  # fmt: skip


def _verdict(
    values: Array, tolerance: float, looks: tuple[int, ...], bounds: tuple[float, float], seed: int
) -> tuple[str, int]:
    """Return the verdict of a run of the test on values drawn from a population, and after how many."""
    x = values[generator("early stop", seed).integers(0, len(values), looks[-1])]
    test = Sequential(tolerance, looks, bounds=bounds)
    for n in looks:
        if (verdict := test.look(x[:n])) != "go on":
            return verdict, n
    return "go on", looks[-1]


def against_itself(pairs: dict[str, Array], scale: float) -> Iterator[Row]:
    """Yield how often the report calls a run beyond noise that is drawn as the baseline is, with other seeds."""
    normal = closed_forms()["normal"]
    scores = {"normal": normal, **{name: x for name, x in pairs.items() if name.startswith("clip_score")}}
    values = {"normal": normal, **{name: x for name, x in pairs.items() if name.startswith("SSIM")}}
    for number, populations in (("difference of a score", scores), ("value and floor", values)):
        for name, population in populations.items():
            for n in (2, 4, 6, 10, 24, 100, 1000):
                most = 4000 if number.startswith("difference") and n >= 10 else 1000
                repeats, draw = max(50, int(scale * most)), generator("itself", number, name, n)
                rows = (_row_of_itself(number, population, n, draw, seed) for seed in range(repeats))
                beyond = sum(row.within_noise is False for row in rows) / repeats
                yield {
                    "number": number, "population": name, "n": n, "beyond noise": beyond,
                    "holds": beyond <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / repeats), "repeats": repeats,
                }  # fmt: skip


def seed_changes(pairs: dict[str, Array]) -> dict[str, Array]:
    """Return what another seed may change in the score of a prompt: normal, heavy-tailed, and as a report's scores."""
    forms = closed_forms()
    heavy = forms["lognormal, sigma 1"]
    scores = {name: x for name, x in pairs.items() if name.startswith("clip_score")}
    return {"normal": forms["normal"], "lognormal, sigma 1, difference of two": heavy - heavy[::-1], **scores}


def _row_of_itself(number: str, population: Array, n: int, draw: np.random.Generator, seed: int) -> comparison_row.Row:
    """Return the row of a comparison of two samples of one population."""
    a, b = (population[draw.integers(0, len(population), n)] for _ in range(2))
    row = comparison_row.Row(metric="ssim", key="SSIM", family="fidelity", run="twin", better="higher")
    if number == "value and floor":
        row.value, row.floor, row.floor_interval = float(a.mean()), float(b.mean()), bootstrap_mean(b, seed=seed)
        row.set_interval("interval", bootstrap_mean(a, seed=seed))
    else:
        row.set_interval("delta_interval", replace(bootstrap_mean(a - b, seed=seed), null=0.0))
    return row


# -- the record -------------------------------------------------------------------------------------------------------


def table(part: str, rows: list[Row]) -> str:
    """Return the rows of one part as a markdown table."""
    heads = HEADS[part]
    lines = [" | ".join(_cell(row[head], head) for head in heads) for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {line} |" for line in lines)])


def summary(tables: dict[str, list[Row]]) -> str:
    """Return the least and the greatest coverage, or the greatest rate of errors, of every kind of number."""
    lines = ["| what | rows | from | least | most |", "|---|---|---|---|---|"]
    for part, rows in tables.items():
        share = next(head for head in ("coverage", "false", "beyond noise") if head in rows[0])
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            kind = row.get("number") or {"means": "means and differences"}.get(part, part)
            if "promised" in row:
                kind += "" if row["promised"] else f", fewer than {FEW} carriers: not promised"
            kinds.setdefault(f"{kind}: {share}", []).append(row)
        for kind, group in kinds.items():
            counts = [row.get("n") or row.get("turns") for row in group]
            least = f"n = {min(counts)}" if all(counts) else ""
            shares = [row[share] for row in group]
            lines.append(
                f"| {kind} | {len(group)} | {least} | {_cell(min(shares), share)} | {_cell(max(shares), share)} |"
            )
    return "\n".join(lines)


def _cell(value: Any, head: str) -> str:
    if head in ("holds", "promised"):
        return "yes" if value else "no"
    if head in ("coverage", "false", "beyond noise", "proven", "no change"):
        return f"{100 * value:.1f} %"
    return "" if value is None else str(value)


def _with_earlier(file: Path, tables: dict[str, list[Row]], *, whole: bool) -> dict[str, list[Row]]:
    """Return the parts of a record that is there already, with those of ``tables`` in their place.

    Rows of a part that was not simulated as a whole take the place of the same rows alone.
    """
    earlier = dict(json.loads(file.read_text())["tables"]) if file.exists() else {}
    if whole:
        return earlier | tables
    for part, rows in tables.items():
        new = {_identity(row): row for row in rows}
        kept = [new.pop(_identity(row), row) for row in earlier.get(part, ())]
        earlier[part] = [*kept, *new.values()]
    return earlier


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("number", "population", "n", "turns", "looks", "noise"))


def _keep(report: record.Record, file: Path, tables: dict[str, list[Row]], *, whole: bool) -> None:
    """Save a record with these rows, in the place of the same ones of a record that is there already."""
    report.finish(tables=_with_earlier(file, tables, whole=whole))
    report.save(file)


def main(argv: list[str] | None = None) -> None:
    """Simulate, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, default=REPORT, help="report.json with the values of every pair")
    parser.add_argument("--part", action="append", choices=HEADS, help="only this part; several")
    parser.add_argument("--number", action="append", help="of distances, only numbers that begin so; several")
    of_sets = "of distances, extrapolation and shares, only"
    parser.add_argument("--population", action="append", choices=FEATURES, help=f"{of_sets} these features; several")
    parser.add_argument("--pictures", action="append", type=int, help=f"{of_sets} sets of so many pictures; several")
    parser.add_argument("--join", action="append", type=Path, default=[], help="folder of a record to add; several")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many repeats; 0.05 for a try")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    options = parser.parse_args(argv)
    if options.join and not options.out:
        parser.error("--join needs --out, the folder of the record that takes the rows.")
    torch.set_num_threads(1)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of_report(options.report)
    only = Only(tuple(options.number or ("",)), tuple(options.population or FEATURES), tuple(options.pictures or ()))
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "means": lambda: means({**closed_forms(), **pairs}, options.scale),
        "ratios": lambda: ratios(options.scale),
        "distances": lambda: distances(options.scale, only),
        "extrapolation": lambda: extrapolations(options.scale, only),
        "shares": lambda: shares(options.scale, only),
        "early stop": lambda: early_stop(pairs, options.scale),
        "A against A": lambda: against_itself(pairs, options.scale),
        "same": lambda: called_same(seed_changes(pairs), options.scale),
    }
    command = ["python", "-m", "scripts.bench_coverage", *(sys.argv[1:] if argv is None else argv)]
    report = record.Record(kind="bench_coverage", settings={"scale": options.scale, "few": FEW}, command=command)
    report.device = record.describe_device(torch.device("cpu"))
    tables: dict[str, list[Row]] = {}
    for folder in options.join:
        _keep(report, options.out / NAME, json.loads((folder / NAME).read_text())["tables"], whole=False)
    for part in options.part or ([] if options.join else parts):
        tables[part] = []
        for row in parts[part]():
            tables[part].append(row)
            print(row, file=sys.stderr, flush=True)
        print(f"## {part}\n\n{table(part, tables[part])}\n", flush=True)
        if options.out:
            _keep(report, options.out / NAME, {part: tables[part]}, whole=only == Only())
    record_tables = _with_earlier(options.out / NAME, {}, whole=True) if options.out else tables
    print(f"## summary\n\n{summary(record_tables)}")


if __name__ == "__main__":
    main()

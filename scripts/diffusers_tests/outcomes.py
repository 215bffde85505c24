"""Outcomes of one test on a stock and on a wrapped pipeline, side by side."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]  # by test
MISSING = ("OSError", "ImportError", "huggingface_hub", "requests.exceptions", "httpx", "ModuleNotFoundError")


def read_rows(file: Path) -> Rows:
    """Return the noted outcomes by test."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["test"]: row for row in rows}


def error_of(row: dict[str, Any]) -> str:
    """Return the name of the error that ended a test."""
    return row.get("message", "").split(":")[0].rpartition(".")[2]


def outcomes_of(stock: Rows) -> Counter[str]:
    """Return the number of tests by outcome; "missing" are those that want a hub folder or a package."""
    return Counter("missing" if is_missing(row) else row["outcome"] for row in stock.values())


def missing_of(stock: Rows) -> dict[str, int]:
    """Return what tests want and do not get, by the beginning of the error."""
    return dict(Counter(row["message"][:120] for row in stock.values() if is_missing(row)))


def is_missing(row: dict[str, Any]) -> bool:
    """Return whether a test failed on the stock pipeline for want of a hub folder or a package."""
    return row["outcome"] == "failed" and row.get("message", "").startswith(MISSING)


@dataclass
class Comparison:
    """The tests that the stock pipeline passes, under one method.

    Attributes:
        passed, refused, failed: how many pass, end with an error of diffaccel's, or fail otherwise.
        outputs, equal: calls whose result is compared, in tests that pass, and those equal to the bit.
        paths: calls by what ran them.
        reasons: refused tests by the message's beginning.
        tests: every test that does not pass, with its error.
        differing: tests that pass with other outputs.
    """

    method: str
    stock_passes: int = 0
    passed: int = 0
    refused: int = 0
    failed: int = 0
    outputs: int = 0
    equal: int = 0
    paths: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, method: str, stock: Rows, wrapped: Rows) -> Comparison:
        """Compare the outcomes of both, test by test."""
        result, paths, reasons = cls(method), Counter[str](), Counter[str]()
        for test, row in stock.items():
            if row["outcome"] != "passed" or test not in wrapped:
                continue
            other = wrapped[test]
            result.stock_passes += 1
            paths.update(other["paths"])
            if other["outcome"] == "passed":
                result.passed += 1
                pairs = list(zip(row["outputs"], other["outputs"], strict=False))
                result.outputs += len(pairs)
                result.equal += sum(a == b for a, b in pairs)
                if row["outputs"] != other["outputs"]:
                    result.differing.append(test)
                continue
            is_refused = error_of(other) in ("DiffAccelError", "UnsupportedBySampler", "NotIdentified")
            result.refused += is_refused
            result.failed += not is_refused
            reasons[" ".join(other.get("message", "").split()[:8])] += is_refused
            result.tests[test] = other.get("message", other["outcome"])
        result.paths, result.reasons = dict(paths), dict(+reasons)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for records."""
        return asdict(self)


def markdown(stock: Rows, comparisons: list[Comparison]) -> str:
    """Return the table."""
    outcomes = outcomes_of(stock)
    lines = [
        f"{len(stock)} tests on the stock pipelines: {outcomes['passed']} pass, {outcomes['skipped']} are skipped, "
        f"{outcomes['missing']} need a hub folder or a package that is not here, {outcomes['failed']} fail otherwise.",
        "",
        "| method | stock passes | pass | refused | fail | outputs equal to the bit | calls by path |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        paths = ", ".join(f"{name} {count}" for name, count in sorted(c.paths.items()))
        lines.append(
            f"| `{c.method}` | {c.stock_passes} | {c.passed} | {c.refused} | {c.failed} | {c.equal} of {c.outputs} "
            f"| {paths} |"
        )
    return "\n".join(lines)

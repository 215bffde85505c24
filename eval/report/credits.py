"""Credits of the zoo models whose pictures a report shows, as their cards ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from diffaccel import zoo


def credits_of(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return by zoo model the attributions of its card, for every such model among the runs.

    A report keeps them under ``credits``; those of a model that is known here are read from its card.
    """
    kept = report.get("credits")
    credits_by_model = dict(kept) if isinstance(kept, Mapping) else {}
    for run in report["runs"]:
        model = zoo_name(str((run.get("settings") or {}).get("model") or ""))
        if model and model not in credits_by_model:
            credits_by_model[model] = sentences(zoo.card(model).get("attribution") or [])
    return {model: lines for model, lines in credits_by_model.items() if lines}


def zoo_name(model: str) -> str:
    """Return the zoo's name of a model, which may be its unpacked folder; "" for any other model."""
    folder = PurePath(model).name.rpartition("-")[0]  # the zoo's folders carry a digest
    return next((name for name in (model, folder) if name in zoo.names()), "")


def sentences(lines: Sequence[str]) -> list[str]:
    """Join the lines of an attribution that were broken inside a sentence."""
    joined: list[str] = []
    for line in lines:
        if joined and not line[:1].isupper():
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined

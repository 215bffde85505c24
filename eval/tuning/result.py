"""The outcome of a tuning: the preset that it writes, and the same as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel import presets, record
from diffaccel.eval.tuning.certificate import times_text
from diffaccel.eval.tuning.choice import NAMES
from diffaccel.eval.tuning.halving import PlanEntry, TuningSearch

CLIFF = 2.0  # a neighbour that loses so many times the gate's tolerance lies beyond a cliff
SEQUENCE = "held-out prompts, the safest plan first, up to the first that fails (arXiv 2110.01052)"


@dataclass(frozen=True, repr=False)
class Tuned:
    """What a tuning found.

    Attributes:
        path: of the preset.
        preset: what is in it.
    """

    path: Path
    preset: dict[str, Any]

    @property
    def default(self) -> str:
        """Name of the certified point that was aimed at, or nearly; "baseline" where no plan passed."""
        return self.preset["default"]

    def sentences(self) -> list[str]:
        """Return the certificate of every point, one sentence each, and what is next to the default one."""
        points = self.preset["points"]
        lines = [f"{name}: {points[name]['certificate']['sentence']}" for name in reversed(NAMES) if name in points]
        lines += [f"{name}: not certified, {why}" for name, why in self.preset["failed"].items()]
        if self.default == presets.BASELINE:
            lines.append("No plan kept the promise: the preset is the baseline.")
        return [*lines, *self.preset["cliffs"], *self._overrun()]

    def _overrun(self) -> list[str]:
        """Return a sentence where the tuning took more than its budget."""
        spent, budget = self.preset["search"]["spent"], self.preset["search"].get("budget", math.inf)
        return [f"It took {spent:.0f} s, more than its budget of {budget:g} s."] if spent > budget else []

    def __repr__(self) -> str:
        return "\n".join([f"{self.path}: {self.default}", *self.sentences()])


def preset_values(
    search: TuningSearch,
    chosen: Mapping[str, PlanEntry],
    certificates: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a preset's file holds.

    Args:
        search: that is over.
        chosen: plans by the names of points.
        certificates: of :func:`diffaccel.eval.tuning.certificate.certify`.
        about: device, versions, architecture, and how the baseline was drawn.
    """
    passed = [name for name in certificates if certificates[name]["keeps"]]
    default = passed[-1] if passed else presets.BASELINE  # the last one that was tested is the aim
    points: dict[str, Any] = {}
    for name in passed:
        values = {**certificates[name], **about["measured"], "order": SEQUENCE}
        points[name] = {**_point(chosen[name]), "certificate": {**values, "sentence": sentence(values)}}
    baseline = search.bed.baseline()
    points[presets.BASELINE] = {"methods": [], "call": dict(baseline.call)}
    neighbours = neighbour_rows(search, chosen[default]) if passed else []
    return {
        "made": record.now(),
        **about["model"],
        "gate": search.promise.gate.text,
        "default": default,
        "points": points,
        "failed": {name: certificate["why"] for name, certificate in certificates.items() if not certificate["keeps"]},
        "neighbours": neighbours,
        "cliffs": cliff_sentences(neighbours) if passed else [],
        "table": pareto(search),
        "search": {
            "plans": len(search.entries), "spent": round(search.journal.spent(), 1), "seed": search.seed,
            "rungs": list(search.sizes.rungs), "held_out": search.sizes.held_out,
            "refused": {entry.name: entry.refused for entry in search.entries.values() if entry.refused},
        },
    }  # fmt: skip


def sentence(certificate: Mapping[str, Any]) -> str:
    """Return a certificate in words: how fast, how near, on what device, against what, on how many prompts."""
    times = times_text(certificate["timing"]["ratio"])
    parts = [f"{name} {_ends(values)}" for name, values in certificate["measures"].items() if name != "speedup"]
    return (
        f"{times} as {certificate['baseline']} on {certificate['device']['name']}, {', '.join(parts)} on "
        f"{certificate['count']} held-out prompts"
    )


def neighbour_rows(search: TuningSearch, entry: PlanEntry) -> list[dict[str, Any]]:
    """Measure the plans one value away on tuning prompts, and return how each stands to the promise."""
    rungs = search.sizes.rungs
    rung = rungs[-2] if len(rungs) > 1 else rungs[0]
    rows = []
    for other in search.beside(entry):
        if other.name != entry.name and search.measure(other, rung):
            rows.append(row(search, other))
    return rows


def row(search: TuningSearch, entry: PlanEntry) -> dict[str, Any]:
    """Return a plan of the search as a row: speed-up, and its metrics on the tuning prompts that it was drawn on."""
    judged, near = search.judge(entry), search.quality_of(entry)
    readings = {**near.readings, **judged.readings}
    return {
        "plan": entry.name,
        "speedup": round(entry.ratio, 4),
        "measures": {name: r.ends for name, r in readings.items()},
        "loss": round(1 - near.margin, 4) if math.isfinite(near.margin) else 0.0,  # infinite: PSNR of equal pictures
        "keeps": judged.margin >= 0,
        "prompts": entry.count,
    }


def cliff_sentences(neighbours: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for every neighbour beyond a cliff; else one that there is none."""
    beyond = [
        f"Cliff: {other['plan']}, one value away, loses {other['loss']:.1f} times what the gate allows."
        for other in neighbours
        if other["loss"] > CLIFF
    ]
    return beyond or [f"No cliff: none of the {len(neighbours)} plans one value away loses twice what the gate allows."]


def pareto(search: TuningSearch) -> list[dict[str, Any]]:
    """Return the rows of the plans that no other beats in both seconds and closeness, the fastest first."""
    return [row(search, entry) for entry in search.front()]


def _point(entry: PlanEntry) -> dict[str, Any]:
    return {"methods": [config.to_dict() for config in entry.variant.methods], "call": dict(entry.variant.call)}


def _ends(values: Mapping[str, Any]) -> str:
    if values["value"] is None:
        return "identical"
    if values["low"] is None:
        return f"{values['value']:.4g}"
    return f"{values['value']:.4g} ({values['low']:.4g} to {values['high']:.4g})"

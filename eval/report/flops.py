"""Floating point operations of a picture: the rows through the network, each counted in closed form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffaccel import zoo
from diffaccel.eval.comparison.row import Row

TERA = 1e12
WHAT = "counted, not estimated: the network's products, attention and convolutions, two operations a multiply-add"
WHOLE = ("euler", "heun", "dpmpp2m", "ancestral", "scheduler", "bon")  # methods that run the whole network at full size


def rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row of FLOPs a picture for every run whose network calls are all of one size and of the whole network.

    They are :func:`diffaccel.families.flops.flops` of the network's config for one row, times the rows that went
    through the network. Of other runs, and of models whose files are not here, there is no row.
    """
    counted: list[Row] = []
    per_row: dict[str, int | None] = {}
    forwards = {row["run"]: row for row in report["metrics"] if row["metric"] == "forwards" and row.get("value")}
    for run in report["runs"]:
        settings, name = run.get("settings") or {}, run["name"]
        methods = [str(method.get("name")) for method in settings.get("methods") or []]
        if name not in forwards or not settings.get("size") or any(method not in WHOLE for method in methods):
            continue
        key = json.dumps([settings.get("model"), settings["size"]])
        if key not in per_row:
            per_row[key] = _flops_of_row(str(settings.get("model") or ""), settings["size"])
        operations = per_row[key]
        if operations is not None:
            counted.append(
                Row(
                    metric="flops", key="FLOPs", family="cost", run=name, better="lower", unit="TFLOP", n=run["images"],
                    value=forwards[name]["value"] * operations / TERA, detail={"from": WHAT},
                )
            )  # fmt: skip
    base = next((row.value for row in counted if row.run == report["baseline"]), None)
    for row in counted:
        if None not in (base, row.value) and row.run != report["baseline"]:
            row.delta = row.value - base  # type: ignore[operator]
    return [row.to_dict() for row in counted]


def _flops_of_row(model: str, size: list[int]) -> int | None:
    """Count the FLOPs of one row through a model's network; None where that is not known here."""
    folder = zoo.path(model) if model in zoo.names() else Path(model).expanduser()
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return _count(folder, index, size, zoo.call_defaults(model).get("max_sequence_length"))
    except Exception:  # a model that is not here, or a network without a closed form: the row is left out
        return None


def _count(folder: Path, index: Mapping[str, Any], size: list[int], text: int | None) -> int:
    import diffusers
    from accelerate import init_empty_weights

    from diffaccel.families.flops import flops

    part = "transformer" if "transformer" in index else "unet"
    cls = getattr(diffusers, index[part][1])
    with init_empty_weights():
        network = cls.from_config(json.loads((folder / part / "config.json").read_text(encoding="utf-8")))
    factor = 1
    if "vae" in index:
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
    height, width = size
    return flops(network, batch=1, height=height // factor, width=width // factor, text=text)

"""The card of coinrun-nfd: what it is, whose pictures it saw, and whether it passes what it is accepted by."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from scripts.zoo.coinrun.recipe import Recipe
from scripts.zoo.emoji.card import APACHE, state

MODEL = "coinrun-nfd"
LARGEST = 8e6  # packed bytes
ATTRIBUTION = """\
CoinRun of the procgen benchmark (c) 2019 OpenAI, MIT, arXiv 1912.01588, https://github.com/openai/procgen
Pictures: platformer art of Kenney (https://www.kenney.nl/assets, CC0); backgrounds and further pictures by ansimuz,
rubberduck, Rawdanitsu, Nidhoggn, tgfcoder, thekingphoenix (CC0), GameArtGuppy.com (CC-BY 4.0), Alucard (CC-BY 3.0) and
CraftPix.net (OGA-BY 3.0); list of sources: ASSET_LICENSES.md of https://github.com/openai/procgen
"""
NOTICE = f"""\
This model was trained from scratch on frames of a game by other authors:

{ATTRIBUTION}
The model's own files are licensed under the Apache License 2.0 (LICENSE-APACHE). Whether weights derive from their
training data in law is unsettled; the attributions above are given either way. beginnings.png shows frames of the game.
"""


def legal(folder: Path) -> None:
    """Write NOTICE and licence, which must accompany the weights."""
    (folder / "NOTICE").write_text(NOTICE)
    shutil.copyfile(APACHE, folder / "LICENSE-APACHE")


def acceptance(report: dict[str, Any], stage: str, packed: int, steps: int = 4) -> list[dict[str, Any]]:
    """Return the table that the model is accepted by, from a job's report; none without one."""
    if stage not in report:
        return []
    row = next(row for row in report[stage] if row["steps"] == steps)
    lasting = report[f"{stage}, long videos"]
    repeat = report["references"]["repeat: PSNR, seen before, action changes"]
    obeyed = row["PSNR, seen before, action changes"]
    checks: list[tuple[str, str, float, bool]] = [
        ("PSNR one frame ahead, pixels seen before, dB", ">= 30", p := row["PSNR, seen before"]["1"], p >= 30),
        ("PSNR four frames ahead, true over random actions, dB", ">= 4", p := row["delta-PSNR"]["4"], p >= 4),
        ("actions read from drawn frames, of those read from real ones", ">= 0.8",
         p := row["actions read, ratio"], p >= 0.8),
    ]  # fmt: skip
    for ahead in ("4", "8"):
        gain = obeyed[ahead] - repeat[ahead]
        checks.append((f"PSNR {ahead} frames ahead over the true video of a repeated action, action changes, dB", "> 0",
                       gain, gain > 0))  # fmt: skip
    for what in ("mean difference of frames", "actions read"):
        ratio = lasting[f"late over early: {what}"]
        checks.append((f"{what}, frames 400 to 500 over 20 to 120", "0.75 to 1.25", ratio, 0.75 <= ratio <= 1.25))
    checks.append(("packed megabytes", "<= 8", packed / 1e6, packed <= LARGEST))
    return [{"check": c, "target": t, "value": round(float(v), 3), "passed": bool(ok)} for c, t, v, ok in checks]


def facts(recipe: Recipe, stage: str, report: dict[str, Any], packed: int, note: str = "") -> dict[str, Any]:
    """Return the card as a table; ``quality`` holds the measured rows of the stage, by the steps of a frame."""
    table = acceptance(report, stage, packed)
    return {
        "name": MODEL, "title": "A world model of CoinRun: the next frame under an action, 64x64 pixels",
        "pipeline": "NextFramePipeline", "licence": "Apache-2.0", "attribution": ATTRIBUTION.strip().splitlines(),
        "state": state({"acceptance": table}), "recipe": recipe.name, "note": note,
        "use": f"diffaccel rollout {MODEL} --out run.mp4, diffaccel play {MODEL}",
        "data": {
            "frames": recipe.pool.frames,
            "levels": "0 to 999,999 of easy CoinRun; measured on levels from 1,000,000 on",
            "actions": "0 to 8: (left, none, right) times (down, none, up); a policy that holds each for some frames",
        },
        "network": recipe.model, "stage": stage, "training": report.get("progress", {}), "acceptance": table,
        "quality": {f"{row['steps']} steps": {k: v for k, v in row.items() if k != "steps"}
                    for row in report.get(stage, [])},
        "bytes": {"packed": packed},
    }  # fmt: skip

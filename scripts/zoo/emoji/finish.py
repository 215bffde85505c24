"""The last step before models are committed: add what an installation needs to check them without any data.

    python -m scripts.zoo.emoji.finish --zoo diffaccel/zoo --data data/emoji [--report OUT]

adds to the judge ``fd_reference_128.npz`` and ``fd_reference_64.npz``, mean ``mu`` and covariance ``sigma`` of its
features of every training icon at that size (Fréchet distances need no pictures then), and to the pipeline's card a
golden picture of four steps, and ``vocabulary.json`` beside that card. References and picture come from the packed
weights, as users load them. With ``--report`` the folder's ``report.json`` and ``grid.png`` (see score.py) go into the
cards. A second run gives the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F

from diffaccel.zoo import packing
from scripts.zoo.emoji import card, export, score, vocabulary
from scripts.zoo.emoji.fetch import WORLD, read_json
from scripts.zoo.emoji.world import World, load

REFERENCES = {128: "fd_reference_128.npz", 64: "fd_reference_64.npz"}
GOLDEN = {"prompt": "red apple, noto", "size": 64, "steps": 4, "guidance": 3.0, "seed": 0}


def reference(judge: score.Judge, world: World, folder: Path) -> dict[str, Any]:
    """Write ``mu`` (D,), ``sigma`` (D, D), ``n`` and ``protocol`` (JSON) for each size, float64."""
    protocol = {
        "protocol": "diffaccel emoji icons, 1",
        "features": "open_clip encode_image, not normalised; pictures in [-1, 1] on white, resized to the judge's "
        "size by area when larger, by antialiased bilinear interpolation when smaller",
        "pictures": "every training icon once, filling the canvas",
    }
    for size, name in REFERENCES.items():
        features = score.icon_features(judge, world, size).double().numpy()
        np.savez(
            folder / name,
            mu=features.mean(0),
            sigma=np.cov(features, rowvar=False),
            n=len(features),
            protocol=np.array(json.dumps({**protocol, "size": size})),
        )
    return {"files": list(REFERENCES.values()), "pictures": len(features), **protocol}


def golden(pipe: Any) -> dict[str, Any]:
    """Draw the golden picture, and return its 8 x 8 averages (3 channels, in [-1, 1]), small enough for a card."""
    settings = {key: GOLDEN[key] for key in ("size", "steps", "guidance", "seed")}
    picture = score.draw(pipe, [GOLDEN["prompt"]], batch=1, **settings)
    values = F.adaptive_avg_pool2d(picture, 8).flatten()
    return {**GOLDEN, "tolerance": 1e-3, "values": [round(value, 4) for value in values.tolist()]}


def finish(zoo: Path, world: World) -> None:
    """Add golden picture and reference to the packed models in ``zoo``."""
    with tempfile.TemporaryDirectory() as scratch:
        pipe, plain = export.reload(zoo, Path(scratch), "cpu")
        facts = reference(score.Judge(plain, "cpu"), world, plain)
        judge = zoo / "emoji-clip-judge"
        packing.pack(plain, judge)
        sizes = {
            "packed": sum(entry["size"] for entry in packing.read_manifest(judge)["packed"].values()),
            "plain": sum(p.stat().st_size for p in plain.rglob("*") if p.is_file()),
        }
        amend(judge, {"fd_reference": facts, "bytes": sizes})
        amend(zoo / export.PIPELINE, {"golden": golden(pipe)})


def publish(zoo: Path, folder: Path) -> None:
    """Put a report and its grid into the cards."""
    report = json.loads((folder / "report.json").read_text())
    judge_rows = [row for row in report["acceptance"] if row["check"].startswith("judge:")]
    amend(zoo / "emoji-clip-judge", {"state": card.state({"acceptance": judge_rows}), "acceptance": judge_rows})
    amend(zoo / "emoji-clip-reward", {"state": "measured (card.json), no acceptance of its own"})
    pipeline = zoo / export.PIPELINE
    shutil.copyfile(folder / "grid.png", pipeline / "grid.png")
    facts = {key: report[key] for key in ("acceptance", "quality")}
    amend(pipeline, {**facts, "state": card.state(report), "note": report.get("note", ""), "grid": "grid.png"})


def amend(model: Path, facts: dict[str, Any]) -> None:
    """Change a card, and the README made from it; neither is a packed file."""
    changed = json.loads((model / "card.json").read_text()) | facts
    (model / "card.json").write_text(json.dumps(changed, indent=1) + "\n")
    (model / "README.md").write_text(card.readme(changed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=Path("diffaccel/zoo"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--report", type=Path, help="folder with report.json and grid.png")
    options = parser.parse_args()
    finish(options.zoo, load(options.data))
    vocabulary.write(options.zoo / export.PIPELINE, read_json(options.data / WORLD)["emoji"])
    if options.report:
        publish(options.zoo, options.report)


if __name__ == "__main__":
    main()

"""Weights that travel: fp32 averages in parts of at most 15 MiB, the pipeline that they make, and the packed model.

python -m scripts.zoo.coinrun.export --recipe full --receive OUT --pipeline FOLDER   # a plain diffusers folder
python -m scripts.zoo.coinrun.export --recipe full --receive OUT --zoo diffaccel/zoo # packed, as it is shipped
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json
from diffaccel.models.next_frame import beginnings
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.training.checkpoint import averages, save_weights
from diffaccel.zoo import packing
from scripts.zoo.coinrun import card
from scripts.zoo.coinrun import recipe as recipes
from scripts.zoo.coinrun.forks import make_forks
from scripts.zoo.coinrun.recipe import Recipe

MODEL = card.MODEL
BEGINNINGS = 8
STAGES = ("teacher", "student", "dynamics")
_PREFIX = {"teacher": "transformer.", "student": "transformer.", "dynamics": "network."}
PART_BYTES = 15 * 2**20


def send(work: Path, out: Path) -> list[Path]:
    """Write the averaged weights of every stage that has begun as ``<stage>-<number>.safetensors``."""
    written = []
    for stage in STAGES:
        if not (work / f"{stage}.safetensors").is_file():
            continue
        for old in out.glob(f"{stage}-*.safetensors"):
            old.unlink()
        parts: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, value in averages(work / f"{stage}.safetensors", _PREFIX[stage]).items():
            if size + value.nbytes > PART_BYTES and parts[-1]:
                parts.append({})
                size = 0
            parts[-1][name] = value.contiguous()
            size += value.nbytes
        for number, part in enumerate(parts, 1):
            file = out / f"{stage}-{number}.safetensors"
            save_file(part, file)
            written.append(file)
    return written


def received(folder: Path, stage: str) -> dict[str, Tensor]:
    """Return the weights of a stage from its parts; nothing where there are none."""
    return {
        name: value for file in sorted(folder.glob(f"{stage}-*.safetensors")) for name, value in load_file(file).items()
    }


def restore(folder: Path, work: Path) -> None:
    """Begin an empty work folder with the weights that another machine sent; training goes on after a warm-up."""
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    for stage in STAGES:
        if weights := received(folder, stage):
            names = {f"{_PREFIX[stage]}{name}": value for name, value in weights.items()}
            if stage != "student":  # whose run also has a weight that was not sent, and is short
                save_weights(names, work / f"{stage}.safetensors", **progress[stage])


def progress_of(work: Path) -> dict[str, Any]:
    """Return step, samples and seconds of every stage's checkpoint."""
    from safetensors import safe_open

    found = {}
    for stage in STAGES:
        file = work / f"{stage}.safetensors"
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                state = json.loads(opened.metadata()["state"])
            found[stage] = {key: state[key] for key in ("step", "samples", "seconds")}
    return found


def pipeline(recipe: Recipe, weights: dict[str, Tensor], consistency: bool) -> NextFramePipeline:
    """Return the pipeline of a recipe with these weights, in fp32 on the CPU."""
    model = NextFrameTransformer(**recipe.model)
    model.load_state_dict(weights)
    kind = FlowMatchLCMScheduler if consistency else FlowMatchEulerDiscreteScheduler
    return NextFramePipeline(model.eval(), kind(shift=recipe.shift), recipe.context_noise)


def pack(recipe: Recipe, source: Path, stage: str, zoo: Path, data: Path, note: str = "") -> Path:
    """Pack the pipeline of a stage into ``zoo/coinrun-nfd``, with what its videos begin with, card and notice.

    Args:
        recipe: of the job.
        source: folder that the job wrote.
        stage: teacher or student.
        zoo: folder of models.
        data: folder of the game, which draws the beginnings.
        note: what somebody who watched the videos says of them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / MODEL
        pipe = pipeline(recipe, received(source, stage), stage == "student")
        pipe.to(torch.bfloat16)
        pipe.save_pretrained(plain)
        made = make_forks(data, BEGINNINGS, min(8, recipe.model["window"]), 1, seed=1)
        beginnings.write(plain, made.given, made.given_actions)
        card.legal(plain)
        shutil.rmtree(zoo / MODEL, ignore_errors=True)
        packed = packing.pack(plain, zoo / MODEL)
    size = sum(entry["size"] for entry in packing.read_manifest(packed)["packed"].values())
    report = source / "report.json"
    told = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    card.legal(packed)
    write_json(packed / "card.json", card.facts(recipe, stage, told, size, note))
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="full")
    parser.add_argument("--receive", type=Path, required=True, help="folder that the job wrote")
    parser.add_argument("--stage", default="student", choices=("teacher", "student"))
    parser.add_argument("--pipeline", type=Path, help="write a plain folder here")
    parser.add_argument("--zoo", type=Path, help="pack the model into this folder of models")
    parser.add_argument("--data", type=Path, default=Path("data/coinrun"), help="folder of scripts.zoo.coinrun.fetch")
    parser.add_argument("--note", default="", help="what somebody who watched the videos says of them, for the card")
    options = parser.parse_args()
    try:
        recipe = recipes.get(options.recipe)
        if not received(options.receive, options.stage):
            raise DiffAccelError(
                f"'{options.receive}' has no weights of the {options.stage}; run the job's stage first."
            )
        if options.pipeline:
            consistency = options.stage == "student"
            pipeline(recipe, received(options.receive, options.stage), consistency).save_pretrained(options.pipeline)
        if options.zoo:
            print(pack(recipe, options.receive, options.stage, options.zoo, options.data, options.note))
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

"""Export a work folder to the packed models of ``diffaccel/zoo``, restore one from them, and split files for transfer.

    python -m scripts.zoo.emoji.export --recipe full --work WORK --zoo diffaccel/zoo [--report report.json]
    python -m scripts.zoo.emoji.export --recipe full --work WORK --zoo OUT --only emoji-clip-judge
    python -m scripts.zoo.emoji.export --receive OUT --zoo diffaccel/zoo

It makes three models: ``emoji-flux`` (a FluxPipeline), ``emoji-clip-reward`` and ``emoji-clip-judge`` (open_clip).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file

from diffaccel.errors import DiffAccelError
from diffaccel.training.checkpoint import save_weights
from diffaccel.zoo import packing
from scripts.zoo.emoji import card, flow, recipe_flow

CLIPS = {"emoji-clip-reward": "clip_a", "emoji-clip-judge": "clip_b"}
PIPELINE = "emoji-flux"
PART_BYTES = 15 * 2**20


def assemble(work: Path, recipe: recipe_flow.Recipe, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """Assemble the pipeline of a work folder, with averaged weights."""
    from transformers import AutoTokenizer, CLIPTextModel

    modules = flow.load(work, recipe.flow)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.flow.shift),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(work / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(work / "tokenizer_2"),
        **modules,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype)
    # A plain from_pretrained gives diffusers' models fp32 and transformers' models the dtype of their file.
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.to(torch.float32)
    return pipe


def export(work: Path, recipe: recipe_flow.Recipe, zoo: Path, report: dict[str, Any] | None = None) -> None:
    """Pack the models of a work folder into ``zoo/<name>``, each with card, README, NOTICE and licence texts."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / PIPELINE
        pipe = assemble(work, recipe, torch.bfloat16)
        pipe.save_pretrained(plain)
        counts = {
            name: _count(getattr(pipe, name)) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
        }
        training = training_state(work / "flow.safetensors")
        _pack(plain, zoo / PIPELINE, card.flux(recipe, counts, training, report or {}))
    for name in CLIPS:
        export_clip(name, work, recipe, zoo, report)


def export_clip(
    name: str, work: Path, recipe: recipe_flow.Recipe, zoo: Path, report: dict[str, Any] | None = None
) -> None:
    """Pack one CLIP of a work folder into ``zoo/<name>``."""
    source = CLIPS[name]
    metrics = work / f"{source}.json"
    quality = json.loads(metrics.read_text()) if metrics.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        plain = shutil.copytree(work / source, Path(scratch) / name)
        _pack(plain, zoo / name, card.clip(name, recipe, report or {}, quality))


def _pack(plain: Path, out: Path, facts: dict[str, Any]) -> None:
    """Pack one model, with its card and licence texts."""
    card.legal(plain)
    packing.pack(plain, out)
    packed = sum(entry["size"] for entry in packing.read_manifest(out)["packed"].values())
    facts["bytes"] = {"packed": packed, "plain": sum(p.stat().st_size for p in plain.rglob("*") if p.is_file())}
    card.legal(out)
    (out / "card.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "README.md").write_text(card.readme(facts))


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def training_state(checkpoint: Path) -> dict[str, Any]:
    """Read steps, samples and seconds of a checkpoint; zeros where there is none yet."""
    from safetensors import safe_open

    if not checkpoint.is_file():
        return {"step": 0, "samples": 0, "seconds": 0.0}
    with safe_open(checkpoint, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    return {key: state[key] for key in ("step", "samples", "seconds")}


def reload(zoo: Path, plain: Path, device: str) -> tuple[FluxPipeline, Path]:
    """Load the packed pipeline as users do (unpacked int8, in fp32), and unpack the judge; return it and its folder."""
    for name in (PIPELINE, "emoji-clip-judge"):
        shutil.rmtree(plain / name, ignore_errors=True)
        packing.unpack(zoo / name, plain / name)
    pipe = FluxPipeline.from_pretrained(plain / PIPELINE, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, plain / "emoji-clip-judge"


def restore(zoo: Path, work: Path) -> None:
    """Fill an empty work folder from packed models: training continues from the averaged, int8-rounded weights.

    The optimiser's moments are lost, so the flow model restarts with a warm-up. Autoencoder and CLIPs are finished;
    ``clip.reopen`` makes a CLIP unfinished again.
    """
    with tempfile.TemporaryDirectory(dir=work.parent) as scratch:
        plain = packing.unpack(zoo / PIPELINE, Path(scratch) / PIPELINE)
        for part in ("vae", "text_encoder", "tokenizer", "tokenizer_2"):
            shutil.copytree(plain / part, work / part, dirs_exist_ok=True)
        for name, target in CLIPS.items():
            if (zoo / name / packing.MANIFEST).is_file():
                packing.unpack(zoo / name, work / target)
                metrics = json.loads((zoo / name / "card.json").read_text())["quality"]
                (work / f"{target}.json").write_text(json.dumps(metrics))
        weights = {
            f"{part}.{key}": value
            for part in ("transformer", "text_encoder_2")
            for file in sorted((plain / part).glob("*.safetensors"))
            for key, value in load_file(file).items()
        }
    training = json.loads((zoo / PIPELINE / "card.json").read_text())["training"]
    save_weights(weights, work / "flow.safetensors", **training)


def split(file: Path, out: Path, size: int = PART_BYTES) -> list[Path]:
    """Cut a file into ``<name>.<sha256>.00of03`` and so on, of at most ``size`` bytes each."""
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()[:16]
    count = max(1, -(-len(data) // size))
    parts = [out / f"{file.name}.{digest}.{i:02d}of{count:02d}" for i in range(count)]
    for i, part in enumerate(parts):
        part.write_bytes(data[i * size : (i + 1) * size])
    return parts


def join(parts: list[Path], target: Path) -> Path:
    """Join the parts of :func:`split`, and verify them.

    Raises:
        DiffAccelError: for a missing or damaged part, and parts of different files.
    """
    matches = {re.fullmatch(r"(.+)\.([0-9a-f]{16})\.(\d+)of(\d+)", part.name): part for part in parts}
    if None in matches or len({(m[1], m[2], m[4]) for m in matches}) != 1:
        raise DiffAccelError(f"These are not the parts of one file: {sorted(p.name for p in parts)}; give one file's.")
    first = next(iter(matches))
    if sorted(int(m[3]) for m in matches) != list(range(int(first[4]))):
        raise DiffAccelError(f"'{first[1]}' has {first[4]} parts, got {len(parts)}; fetch the missing ones.")
    data = b"".join(part.read_bytes() for _, part in sorted(matches.items(), key=lambda item: int(item[0][3])))
    if hashlib.sha256(data).hexdigest()[:16] != first[2]:
        raise DiffAccelError(f"The parts of '{first[1]}' are damaged: their sha256 differs; fetch them again.")
    target.write_bytes(data)
    return target


def send(zoo: Path, out: Path) -> list[Path]:
    """Write all packed models of a folder to ``out``, as parts of one tar."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("zoo.tar.*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / "zoo.tar"
        with tarfile.open(tar, "w") as archive:
            for name in (PIPELINE, *CLIPS):
                archive.add(zoo / name, arcname=name)
        return split(tar, out)


def receive(folder: Path, zoo: Path) -> None:
    """Put the packed models of :func:`send` in place, and verify them."""
    with tempfile.TemporaryDirectory() as scratch:
        tar = join(sorted(folder.glob("zoo.tar.*")), Path(scratch) / "zoo.tar")
        with tarfile.open(tar) as archive:
            archive.extractall(scratch, filter="data")
        for name in (PIPELINE, *CLIPS):
            manifest = packing.read_manifest(Path(scratch) / name)
            packing.verify(Path(scratch) / name, manifest["packed"], "Packed model file", "fetch it again")
            shutil.rmtree(zoo / name, ignore_errors=True)
            shutil.copytree(Path(scratch) / name, zoo / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="full")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--zoo", type=Path, default=Path("diffaccel/zoo"))
    parser.add_argument("--report", type=Path, help="what score.py measured")
    parser.add_argument("--only", choices=sorted(CLIPS), help="export this CLIP alone")
    parser.add_argument("--receive", type=Path, help="folder with the zoo.tar parts that a job returned")
    options = parser.parse_args()
    if options.receive:
        receive(options.receive, options.zoo)
    elif options.work:
        report = json.loads(options.report.read_text()) if options.report else None
        if options.only:
            export_clip(options.only, options.work, recipe_flow.get(options.recipe), options.zoo, report)
            return
        export(options.work, recipe_flow.get(options.recipe), options.zoo, report)
    else:
        parser.error("give --work to export from, or --receive")


if __name__ == "__main__":
    main()

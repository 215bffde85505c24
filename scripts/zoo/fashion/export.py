"""Packed models of fashion-unet and its students, with cards; parts that travel.

    python -m scripts.zoo.fashion.export --receive OUT --zoo diffaccel/zoo   # and the classifier

A packed folder holds ``unet`` and ``scheduler`` as diffusers reads them; the classifier has a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json, write_text
from diffaccel.zoo import packing
from scripts.zoo.emoji.export import join, split
from scripts.zoo.fashion.classifier import Classifier
from scripts.zoo.fashion.fetch import NOTICE

MODEL, JUDGE, ARCHIVE = "fashion-unet", "fashion-classifier", "fashion.tar"
LARGEST = 2e6  # packed bytes of a model


def pack(folder: Path, name: str, network: UNet2DModel, scheduler: Any, report: dict[str, Any]) -> Path:
    """Pack a network with its scheduler into ``folder / name``, with card and notice."""
    out = folder / name
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / name
        network.save_config(plain / "unet")
        weights = {
            key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in network.state_dict().items()
        }
        save_file(weights, plain / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        scheduler.save_pretrained(plain / "scheduler")
        write_text(plain / "NOTICE", NOTICE)
        shutil.rmtree(out, ignore_errors=True)
        packing.pack(plain, out)
    size = sum(entry["size"] for entry in packing.read_manifest(out)["packed"].values())
    write_json(out / "card.json", card(name, network, size, report))
    write_text(out / "NOTICE", NOTICE)
    return out


def pack_classifier(folder: Path, network: Classifier, accuracy: float | None) -> Path:
    """Pack the classifier whose features judge, exactly, in float16."""
    out = folder / JUDGE
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / JUDGE
        plain.mkdir()
        state = {key: value.detach().to("cpu", torch.float16) for key, value in network.state_dict().items()}
        save_file(state, plain / "model.safetensors")
        write_text(plain / "NOTICE", NOTICE)
        shutil.rmtree(out, ignore_errors=True)
        packing.pack(plain, out, keep=("*",))
    facts = {
        "name": JUDGE,
        "title": "a classifier of Fashion-MNIST whose features judge drawings",
        "accuracy": accuracy,
    }
    write_json(out / "card.json", {**facts, "licence": "Apache-2.0", "attribution": NOTICE.strip().splitlines()})
    write_text(out / "NOTICE", NOTICE)
    return out


def card(name: str, network: UNet2DModel, size: int, report: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a model: what it is, its size, how it was trained and measured."""
    return {
        "name": name, "title": "a class-conditional UNet that draws Fashion-MNIST at 32x32, in [-1, 1]",
        "licence": "Apache-2.0", "attribution": NOTICE.strip().splitlines(),
        "parameters": sum(p.numel() for p in network.parameters()), "bytes": {"packed": size},
        "fits": size <= LARGEST, **report,
    }  # fmt: skip


def unpacked(packed: Path, folder: Path) -> UNet2DModel:
    """Return the network of a packed model as it is shipped, in float32."""
    plain = packing.unpack(packed, folder)
    return UNet2DModel.from_pretrained(plain / "unet", torch_dtype=torch.float32).eval()


def send(averages: Path, models: Path, out: Path) -> list[Path]:
    """Write packed models and a folder of averages that training can go on from, as parts of one tar."""
    for old in out.glob(f"{ARCHIVE}.*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / ARCHIVE
        with tarfile.open(tar, "w") as archive:
            for model in sorted(models.glob("*/")):
                archive.add(model, arcname=model.name)
            for file in sorted(averages.glob("*.safetensors")):
                archive.add(file, arcname=f"averages/{file.name}")
        return split(tar, out)


def receive(folder: Path, into: Path) -> Path:
    """Unpack what :func:`send` wrote into a folder, verified."""
    parts = sorted(folder.glob(f"{ARCHIVE}.*"))
    if not parts:
        raise DiffAccelError(f"'{folder}' has no parts of {ARCHIVE}; give the folder that a job wrote.")
    into.mkdir(parents=True, exist_ok=True)
    tar = join(parts, into / ARCHIVE)
    with tarfile.open(tar) as archive:
        archive.extractall(into, filter="data")
    tar.unlink()
    for model in (*into.glob(f"{MODEL}*/"), *into.glob(f"{JUDGE}/")):
        packing.verify(model, packing.read_manifest(model)["packed"], "Packed model file", "fetch it again")
    return into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--receive", type=Path, required=True, help="folder with the parts that a job returned")
    parser.add_argument("--student", default="sim-1step-0", help="which of the students becomes fashion-unet-1step")
    parser.add_argument("--zoo", type=Path, default=Path("diffaccel/zoo"))
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            received = receive(options.receive, Path(scratch))
            models = {JUDGE: JUDGE, MODEL: MODEL, f"{MODEL}-{options.student}": f"{MODEL}-1step"}
            if missing := [source for source in models if not (received / source).is_dir()]:
                known = ", ".join(sorted(model.name for model in received.glob(f"{MODEL}*/")))
                raise DiffAccelError(f"'{options.receive}' has no '{missing[0]}', only {known}.")
            for source, name in models.items():
                shutil.rmtree(options.zoo / name, ignore_errors=True)
                shutil.copytree(received / source, options.zoo / name)
                facts = json.loads((options.zoo / name / "card.json").read_text(encoding="utf-8"))
                write_json(options.zoo / name / "card.json", {**facts, "name": name})
                print(options.zoo / name)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

"""Pack a student of emoji-flux as changes of low rank of its weights; parts that travel.

python -m scripts.zoo.emoji_1step.export --receive OUT --zoo diffaccel/zoo
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffaccel import zoo
from diffaccel.distill import Distillation, student
from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json
from diffaccel.zoo import packing
from scripts.zoo.emoji.export import join, split

BASE, ARCHIVE = "emoji-flux", "emoji-1step.tar"
CHANGE_BYTES, LARGEST = 1_600_000, 2e6  # of the factors, and packed
_LEGAL = ("NOTICE", "LICENSE-APACHE", "LICENSE-MIT")


def packed_base() -> Path:
    """Return the packed folder of the installed teacher."""
    return Path(zoo.__file__).parent / BASE


def pack(run: Distillation, models: Path, quality: dict[str, Any]) -> tuple[Path, int]:
    """Pack a run's student into ``models / "emoji-flux-Nstep"`` with its card; return the folder, and packed bytes."""
    from diffusers import FluxPipeline

    steps = run.config.student_steps
    out, own = models / f"{BASE}-{steps}step", student(run)
    pipe = FluxPipeline.from_pretrained(zoo.path(BASE), dtype=torch.float32)  # other parts are the base's to the bit
    pipe.register_modules(transformer=own.transformer.cpu(), scheduler=own.scheduler)
    for part in (pipe.transformer, pipe.vae):  # the text encoders have the dtype of the base's file
        part.bfloat16()
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / out.name
        pipe.save_pretrained(plain)
        for name in _LEGAL:
            shutil.copyfile(packed_base() / name, plain / name)
        shutil.rmtree(out, ignore_errors=True)
        packing.pack(plain, out, base=packed_base(), change_bytes=CHANGE_BYTES)
    size = sum(entry["size"] for entry in packing.read_manifest(out)["packed"].values())
    defaults = {**zoo.call_defaults(BASE), "num_inference_steps": steps, "true_cfg_scale": 1.0}
    defaults.pop("negative_prompt", None)
    base = zoo.card(BASE)
    facts = {
        "name": out.name, "title": f"emoji-flux in {steps} network call{'s' * (steps > 1)}", "base": BASE,
        "pipeline": "FluxPipeline", "defaults": defaults, "bytes": {"packed": size},
        "training": {"options": run.config.to_dict(), "turns": run.step, "drawings": run.pictures,
                     "seconds": round(run.seconds, 1)},
        **{key: base[key] for key in ("licence", "attribution", "data") if key in base}, "quality": quality,
    }  # fmt: skip
    write_json(out / zoo.CARD, facts)
    for name in (*_LEGAL, "vocabulary.json"):
        shutil.copyfile(packed_base() / name, out / name)
    return out, size


def unpacked(packed: Path, plain: Path) -> Any:
    """Return the packed student as users load it, in float32."""
    import diffaccel

    shutil.rmtree(plain, ignore_errors=True)
    pipe = diffaccel.load(packing.unpack(packed, plain, base=packed_base()), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def send(packed: Path, out: Path) -> list[Path]:
    """Write a packed model as parts of a tar."""
    for old in out.glob(f"{ARCHIVE}.*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / ARCHIVE
        with tarfile.open(tar, "w") as archive:
            archive.add(packed, arcname=packed.name)
        return split(tar, out)


def receive(folder: Path, models: Path) -> list[Path]:
    """Put the packed model of :func:`send` in place, verified."""
    with tempfile.TemporaryDirectory() as scratch:
        tar = join(sorted(folder.glob(f"{ARCHIVE}.*")), Path(scratch) / ARCHIVE)
        with tarfile.open(tar) as archive:
            archive.extractall(Path(scratch) / "models", filter="data")
        placed = []
        for model in (Path(scratch) / "models").iterdir():
            packing.verify(model, packing.read_manifest(model)["packed"], "Packed model file", "fetch it again")
            shutil.rmtree(models / model.name, ignore_errors=True)
            placed.append(Path(shutil.copytree(model, models / model.name)))
    return placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--receive", type=Path, required=True, help="folder with the parts that a job returned")
    parser.add_argument("--zoo", type=Path, default=Path("diffaccel/zoo"))
    options = parser.parse_args()
    try:
        if not list(options.receive.glob(f"{ARCHIVE}.*")):
            raise DiffAccelError(f"'{options.receive}' has no parts of {ARCHIVE}; give the folder that a job wrote.")
        print(*receive(options.receive, options.zoo), sep="\n")
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

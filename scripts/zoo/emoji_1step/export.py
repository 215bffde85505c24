"""Pack a student of emoji-flux as changes of low rank of its weights; parts that travel.

python -m scripts.zoo.emoji_1step.export --receive OUT --zoo diffaccel/zoo
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
from PIL import Image

from diffaccel import zoo
from diffaccel.distill import Distillation, student
from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json, write_png, write_text
from diffaccel.zoo import packing
from scripts.zoo.emoji.card import CAPTION, state
from scripts.zoo.emoji.export import join, split

BASE, ARCHIVE = "emoji-flux", "emoji-1step.tar"
CHANGE_BYTES, LARGEST = 1_600_000, 2e6  # of the factors, and packed
PACKED = "student, packed"  # its row of the report
_LEGAL = ("NOTICE", "LICENSE-APACHE", "LICENSE-MIT")
_LEAST_JUDGE, _LARGEST_FD = 0.95, 2.0  # of the teacher's


def packed_base() -> Path:
    """Return the packed folder of the installed teacher."""
    return Path(zoo.__file__).parent / BASE


def pack(run: Distillation, models: Path, quality: dict[str, Any], begin: str | None = None) -> tuple[Path, int]:
    """Pack a run's student into ``models / "emoji-flux-Nstep"`` with its card; return the folder, and packed bytes.

    Args:
        begin: the student that the run began as, for the card; None for the teacher.
    """
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
                     "seconds": round(run.seconds, 1), **({"begun_as": begin} if begin else {})},
        **{key: base[key] for key in ("licence", "attribution", "data") if key in base}, "quality": quality,
    }  # fmt: skip
    write_json(out / zoo.CARD, {**facts, **accepted(quality, size)})
    for name in (*_LEGAL, "vocabulary.json"):
        shutil.copyfile(packed_base() / name, out / name)
    return out, size


def accepted(quality: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the table that a student is accepted by, and the state that follows; no row of what was not measured."""
    rows = [("packed megabytes", f"<= {LARGEST / 1e6:g}", size / 1e6, size <= LARGEST)]
    if PACKED in quality:
        teacher = next(row for name, row in quality.items() if name.startswith("teacher, "))
        judge = quality[PACKED]["judge"] / teacher["judge"]
        rows.append(("judge's score over the teacher's", f">= {_LEAST_JUDGE}", judge, judge >= _LEAST_JUDGE))
        if "fd" in teacher:
            fd = quality[PACKED]["fd"] / teacher["fd"]
            rows.append(("Fréchet distance over the teacher's", f"<= {_LARGEST_FD}", fd, fd <= _LARGEST_FD))
    table = [{"check": c, "target": t, "value": round(v, 3), "passed": ok} for c, t, v, ok in rows]
    return {"acceptance": table, "state": state({"acceptance": table} if PACKED in quality else {})}


def readme(card: dict[str, Any]) -> str:
    """Return a student's page, from its card."""
    rows = {name: row for name, row in card["quality"].items() if isinstance(row, dict)}
    call = ", ".join(f"{key}={value}" for key, value in card["defaults"].items())
    training = card["training"]
    lines = [
        f"# {card['name']}", "",
        f"{card['title']}: distilled from {card['base']} by score implicit matching (arXiv 2410.16794), without data, "
        f"in {training['turns']} turns and {training['seconds']:.0f} s on one NVIDIA H200"
        f"{', begun as ' + training['begun_as'] if 'begun_as' in training else ''}. State: "
        f"**{card['state']}**.", "",
        "![16 prompts a row: the teacher at 28, 8, 4, 2 and 1 steps, the student, the packed student](grid.png)",
        "", CAPTION, "", "```python", "import diffaccel", "", f'pipe = diffaccel.load("{card["name"]}")',
        f'pipe("red apple, noto", {call}).images[0]', "```", "",
        "Guidance is in the student: leave `true_cfg_scale` at 1. Prompts, styles and labels are those of "
        f"{card['base']}. Only what differs from {card['base']} is packed: changes of low rank, "
        f"{card['bytes']['packed'] / 1e6:.2f} MB.", "",
        f"{card['quality']['pictures']} prompts that no training had, 128 px (`python -m scripts.zoo.emoji_1step.job "
        "--stages score`):", "",
        "| drawn by | judge's cosine | Fréchet distance to the training icons |", "|---|---|---|",
        *(f"| {name} | {row['judge']} | {row.get('fd', '')} |" for name, row in rows.items()), "",
        "| check | accepted from | value | |", "|---|---|---|---|",
        *(f"| {r['check']} | {r['target']} | {r['value']} | {'yes' if r['passed'] else 'no'} |"
          for r in card["acceptance"]), "",
        "## Attribution", "", *card["attribution"], "",
    ]  # fmt: skip
    return "\n".join(lines)


def finish(model: Path, out: Path) -> None:
    """Put the page of a received model beside it, and the grid that its job drew."""
    card = json.loads((model / zoo.CARD).read_text(encoding="utf-8"))
    card |= accepted(card["quality"], card["bytes"]["packed"])
    write_json(model / zoo.CARD, card)
    if PACKED in card["quality"]:
        write_text(model / "README.md", readme(card))
    if (out / "grid.png").is_file():
        with Image.open(out / "grid.png") as grid:
            half = grid.convert("RGB").resize((grid.width * 5 // 8, grid.height * 5 // 8), Image.Resampling.LANCZOS)
        write_png(model / "grid.png", half.quantize(256))


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
        for model in receive(options.receive, options.zoo):
            finish(model, options.receive)
            print(model)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

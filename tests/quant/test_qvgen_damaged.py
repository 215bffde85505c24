"""Damaged checkpoints and data of quantization-aware training are named in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import qvgen_bed
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffaccel.errors import DiffAccelError
from diffaccel.quant import QVGen
from diffaccel.quant.qvgen.data import encoded_pictures, read_samples
from diffaccel.quant.qvgen.run import QATRun

CONFIG = QVGen(rank=4, steps=6, batch=2, groups=5, layers="all", save_seconds=1e9)


def make(folder: Path) -> QATRun:
    teacher = qvgen_bed.teacher(qvgen_bed.network(0, heads=2, layers=1))
    return QATRun(teacher, qvgen_bed.samples(8), CONFIG, folder)


@pytest.mark.parametrize("damage", ("lost", "shape", "step", "options", "state"))
def test_checkpoints(damage: str, tmp_path: Path) -> None:
    run = make(tmp_path)
    run.save()
    tensors: dict[str, Any] = load_file(run.checkpoint)
    with safe_open(run.checkpoint, "pt") as file:
        state: Any = json.loads(file.metadata()["state"])
    name = next(key for key in tensors if key.startswith("live.") and key.endswith("weight"))
    if damage == "lost":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.zeros(3, 3, dtype=torch.float32, device="cpu")
    else:
        state = {"step": {**state, "step": "x"}, "options": {**state, "options": []}, "state": [1]}[damage]
    save_file(tensors, run.checkpoint, metadata={"state": json.dumps(state)})
    with pytest.raises(DiffAccelError, match=r"is damaged|no whole checkpoint"):
        make(tmp_path)


def test_one_bit_of_a_checkpoint_and_of_samples(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.save()
    qvgen_bed.samples(8).save(tmp_path / "x.safetensors")
    for file, read in ((run.checkpoint, lambda: make(tmp_path)), (tmp_path / "x.safetensors", None)):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(DiffAccelError, match="is damaged, or was changed"):
            read() if read else read_samples(file)


@pytest.mark.parametrize("prompts", ("3", "[1, 2]", '{"a": 1, "b": 2}', '"ab"'))
def test_prompts_of_samples(prompts: str, tmp_path: Path) -> None:
    x0 = torch.zeros(2, 4, 8, 8, dtype=torch.float32, device="cpu")
    save_file({"x0": x0}, tmp_path / "x.safetensors", metadata={"prompts": prompts})
    with pytest.raises(DiffAccelError, match="holds no samples"):
        read_samples(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    (
        ("metadata.jsonl", b"{", "is no JSON object"),
        ("metadata.jsonl", b"3", "is no JSON object"),
        ("a.txt", b"\xff\xfe", "is no text in UTF-8"),
        ("a.txt", b"a cat", "is no whole picture"),
    ),
)
def test_folders_of_pictures(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / name).write_bytes(content)
    pipe = tiny.make("flux")
    with pytest.raises(DiffAccelError, match=said):
        encoded_pictures(pipe, tmp_path, {"height": 32, "width": 32})

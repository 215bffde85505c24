"""Files of a plan and of its work that are damaged: one sentence, and nothing is applied."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.quant import MixDQ, read_plan
from diffaccel.quant.mixdq.sensitivity import RecordFile
from diffaccel.quant.mixdq.work import make
from diffaccel.quant.stored import StoredQuantization

CONFIG = MixDQ(
    samples=2, probes=1, steps=1, allocation="uniform", weight_bits=4, activation_scale="tensor",
    skip=("down_blocks", "up_blocks"),
)  # fmt: skip
LAYER = "mid_block.attentions.0.proj_in"
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, CHANNELS = "mid_block.resnets.0.conv1", 16


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    made(folder)
    return folder


def made(folder: Path) -> Any:
    return make(tiny.make("sd"), CONFIG, folder, ("a", "b"), {"height": 32, "width": 32})


@pytest.mark.parametrize(
    ("place", "value"),
    (
        ("network", "x"),
        ("network", {}),
        ("settings", []),
        ("settings.scales", "foo"),
        ("settings.activation_scale", "foo"),
        ("settings.group_size", "x"),
        ("settings.group_size", -64),
        ("provenance", []),
        ("results", None),
        ("layers", {}),
        ("first_row", ""),
        ("layer.low", [float("nan")]),
        ("layer.low", [1e30]),
        ("layer.high", []),
        ("layer.split", 9999),
        ("layer.split", -3),
        ("layer.first_row", True),
        ("layer.weight", 4.0),
        ("layer.size", 0),
        ("layer.size", 1.5),
        ("layer.size", 1e400),
        ("layer.activation", 8.0),
        ("layer.split", 2.7),
        ("layer.first_row", "false"),
        ("layer.low", "1"),
        ("layer.bits", 4),
        ("linear.split", 4),
        ("conv.first_row", True),
        ("format", 1.0),
    ),
)
def test_plans(place: str, value: Any, work: Path, tmp_path: Path) -> None:
    values = json.loads((work / "plan.json").read_text())
    part, _, key = place.rpartition(".")
    layers = {"layer": LAYER, "linear": LINEAR, "conv": CONV}
    owner = values["layers"][layers[part]] if part in layers else values[part] if part else values
    owner[key] = value
    if part in ("linear", "conv"):  # beside what would go with it
        owner["activation"], values["first_row"] = 16, base64.b64encode(bytes(4 * CHANNELS)).decode()
    (tmp_path / "plan.json").write_text(json.dumps(values))
    pipe = tiny.make("sd")
    with pytest.raises(DiffAccelError):
        diffaccel.accelerate(pipe, MixDQ(plan=str(tmp_path / "plan.json")))
    assert type(pipe.unet.get_submodule(LAYER)).__name__ in ("Linear", "Conv2d")


def test_a_layer_twice(work: Path, tmp_path: Path) -> None:
    text = (work / "plan.json").read_text()
    line = next(line for line in text.splitlines() if LINEAR in line)
    (tmp_path / "plan.json").write_text(text.replace(line, f"{line}\n{line}"))
    with pytest.raises(DiffAccelError, match=f"'{LINEAR}' is in it twice"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ("", "{", "[]", "{}"))
@pytest.mark.parametrize("name", ("calibration.json", "work.json"))
def test_files_of_the_work(name: str, text: str, work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(work, folder)
    (folder / "plan.json").unlink()
    (folder / name).write_text(text)
    with pytest.raises(DiffAccelError, match=rf"{name}' is damaged .* Throw .* away"):
        made(folder)


def test_files_of_other_work(work: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(work, tmp_path / name))

    folder = copied("calibration")
    (folder / "plan.json").unlink()
    values = json.loads((folder / "calibration.json").read_text())
    del values["layers"][LAYER]  # which would stay in high precision, and nobody would know
    (folder / "calibration.json").write_text(json.dumps(values))
    with pytest.raises(DiffAccelError, match=r"calibration.json' is damaged \(it was changed since"):
        made(folder)
    folder = copied("identity")
    (folder / "work.json").unlink()
    with pytest.raises(DiffAccelError, match=r"has calibration.json and plan.json and no work.json"):
        made(folder)
    folder = copied("plan")
    values = json.loads((folder / "plan.json").read_text())
    values["settings"]["weight_bits"] = 8
    (folder / "plan.json").write_text(json.dumps(values))
    with pytest.raises(DiffAccelError, match=r"plan.json' has the work of other options \(weight_bits\)"):
        made(folder)


WRONG = (
    "xx", "[]", '{"key": "a"}', *(f'{{"key": "a", "value": {value}}}' for value in ("null", "NaN", "true", '"3"')),
    '{"key": "a", "value": 2.0, "check": "00000000"}',
)  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_measured_numbers(line: str, tmp_path: Path) -> None:
    (tmp_path / "measured.jsonl").write_text(f'{{"key": "b", "value": 1}}\n{line}\n')
    with pytest.raises(DiffAccelError, match=r"Line 2 of .* is damaged"):
        RecordFile(tmp_path / "measured.jsonl")


def test_layers_of_a_stored_model_are_lists() -> None:
    stored = {"format_version": 1, "method": {"name": "mixdq"}, "layers": {"w8a8": 3}}
    with pytest.raises(DiffAccelError, match=r"must be lists of names"):
        StoredQuantization.read(stored)

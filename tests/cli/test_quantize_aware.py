"""``diffaccel quantize --method qvgen``: stops by time, goes on, saves a model that loads; errors before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import FluxPipeline

import diffaccel
from diffaccel.cli import main
from diffaccel.cli.distill import UNFINISHED
from diffaccel.quant.low_bit.linear import LowBitLinear


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.make("flux").save_pretrained(folder)
    return folder


def words(model: Path, out: Path, *more: str) -> list[str]:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("a red apple\na blue house\na cat\n", encoding="utf-8")
    base = ["quantize", str(model), "--method", "qvgen", "--data", str(prompts), "--size", "32", "--device", "cpu"]
    options = ["--steps", "2", "--qvgen.steps", "3", "--qvgen.rank", "2", "--qvgen.batch", "2", "--qvgen.groups", "4"]
    return [*base, *options, "--out", str(out), *more]


@pytest.mark.slow
def test_a_model_is_trained_and_loads(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(words(model, out, "--seconds", "0.000001")) == UNFINISHED
    assert not (out / "model_index.json").exists()
    capsys.readouterr()
    assert main(words(model, out, "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 3 and said["method"]["weight_bits"] == 4
    pipe = FluxPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    layers = [m for m in pipe.transformer.modules() if isinstance(m, LowBitLinear)]
    assert layers and all(m.form.act_groups == 4 and m.form.rank == 0 for m in layers)
    drawn = pipe(**tiny.call_kwargs("flux")).images
    other = diffaccel.load(out)
    assert torch.equal(other(**tiny.call_kwargs("flux")).images, drawn)
    record = json.loads((out / "quantized.json").read_text())
    assert record["samples"] == 3 and record["data"] == "drawn" and record["options"]["steps"] == 3
    assert main(words(model, out)) == 0  # all is made


@pytest.mark.parametrize(
    ("more", "text"),
    (
        (["--qvgen.weigt-bits", "4"], "Did you mean 'weight_bits'"),
        (["--qvgen.weight-bits", "1"], "must be 2 to 8"),
        (["--preset", "lsqq"], "Did you mean 'lsq'"),
        (["--w8a8.dtype", "fp8"], "--w8a8.dtype is no option of 'qvgen'"),
        (["--scan", "x"], "--scan and --export are of methods that are not trained"),
        (["--seconds", "0"], "must be above 0"),
        (["--seed", "99999999999999999999999"], "must be from -2**62 to 2**62"),
        (["--steps", "0"], "--steps is 0; it must be 1 or more"),
        (["--qvgen.skip", '["no_such_block"]'], "matches no layer"),
        (["--overwrite"], "Give another --out"),
    ),
)
def test_errors_before_any_work(
    more: list[str], text: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(model, tmp_path / "out", *more)) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_data_belongs_to_methods_that_are_trained(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", str(model), "--method", "qvgen", "--out", out]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert main(["quantize", str(model), "--data", "x", "--out", out]) == 2
    assert "--data is of methods that are trained" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    assert main(words(model, tmp_path / "full")) == 2
    assert "holds no training that could go on" in capsys.readouterr().err

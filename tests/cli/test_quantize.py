"""``diffaccel quantize``: the saved folder is what accelerate computes; bad input changes nothing."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import tiny
import tiny_more
import torch
from diffusers import FluxPipeline

import diffaccel
from diffaccel import cli
from diffaccel.quant import W8A8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "flux"
    tiny.make("flux").save_pretrained(folder)
    return folder


def draw(pipe: FluxPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return tiny_more.result(pipe(**tiny.call_kwargs("flux"))).clone()


@pytest.mark.slow
def test_the_folder_is_what_accelerate_computes(model: Path, tmp_path: Path, capsys) -> None:
    words = ["--method", "w8a8", "--w8a8.dtype", "fp8", "--w8a8.modulation", "keep", "--device", "cpu"]
    assert cli.main(["quantize", str(model), *words, "--json", "--out", str(tmp_path / "out")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["method"]["dtype"] == "fp8" and said["networks"][0]["share"] < 1
    expected = draw(diffaccel.accelerate(diffaccel.load(str(model)), W8A8(dtype="fp8", modulation="keep")))
    assert torch.equal(draw(FluxPipeline.from_pretrained(tmp_path / "out")), expected)
    assert torch.equal(draw(diffaccel.load(tmp_path / "out")), expected)


@pytest.mark.slow
def test_a_scan_and_the_other_schema(tmp_path: Path, capsys) -> None:
    tiny.make("sd").save_pretrained(tmp_path / "sd")
    words = [
        "quantize",
        str(tmp_path / "sd"),
        "--method",
        "w4a16",
        "--device",
        "cpu",
        "--scan",
        "a cat",
        "--steps",
        "1",
    ]
    assert cli.main([*words, "--json", "--out", str(tmp_path / "one")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["scan"]["layers"]) == said["networks"][0]["layers"] > 0
    assert cli.main([*words, "--export", "compressed-tensors", "--out", str(tmp_path / "two")]) == 0
    told = capsys.readouterr().out
    assert "UNet2DConditionModel" in told and "proposed skip" in told
    schema = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert schema["quant_method"] == "compressed-tensors"


def test_a_plain_network_that_returns_no_numbers(tmp_path: Path, capsys) -> None:
    pipe = tiny.make("sd")
    pipe.unet.conv_in.weight.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "sd")
    words = ["quantize", str(tmp_path / "sd"), "--device", "cpu", "--scan", "a cat", "--steps", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "before anything is quantized" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (["--method", "w9a9"], "Unknown method 'w9a9'"),
        (["--method", "euler"], "is a sampler"),
        (["--method", "spectrum"], "is no quantizer"),
        (["--w4a16.group_size", "64"], "is an option of 'w4a16'"),
        (["--w8a8.dtype", "int3"], "int3"),
        (["--dtype", "int8"], "Unknown dtype"),
        (["--method", "w4a16", "--w4a16.group_size", "3"], "must be even"),
        (["--steps", "3"], "--steps is of the drawing of --scan"),
        (["--scan", "x", "--steps", "0"], "--steps is 0; it must be 1 or more"),
        (["--seed", "3"], "--seed is of methods that are trained"),
        (["--method", "mixdq", "--steps", "3"], "--mixdq.steps"),
        (["--method", "mixdq", "--export", "compressed-tensors"], "has no form for the mixed precision"),
    ),
)
def test_bad_words(words: list[str], said: str, model: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["quantize", str(model), *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_holds_something(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert cli.main(["quantize", str(model), "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err and (tmp_path / "kept.txt").exists()
    assert cli.main(["quantize", str(model), "--device", "cpu", "--out", str(tmp_path), "--overwrite"]) == 0
    assert not (tmp_path / "kept.txt").exists() and (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize("method", ("w8a8", "mixdq"))
def test_nothing_is_thrown_away_for_a_command_that_fails(method: str, model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.txt").write_text("a red apple\n")
    words = ["--method", method, "--device", "cpu", "--out", str(out), "--overwrite"]
    assert cli.main(["quantize", str(tmp_path / "nowhere"), *words]) == 2
    if method == "w8a8":
        assert cli.main(["quantize", str(model), *words, "--w8a8.skip", '["nothing"]']) == 2
    else:
        assert cli.main(["quantize", str(model), *words, "--prompts", str(out / "kept.txt")]) == 2
        assert "would throw away --prompts" in capsys.readouterr().err
    assert (out / "kept.txt").exists()


def test_nothing_is_thrown_away_for_a_model_that_cannot_be_saved(
    model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(pipe: FluxPipeline, folder: Path) -> None:
        (folder / "vae").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FluxPipeline, "save_pretrained", save)
    (tmp_path / "kept.txt").write_text("mine")
    assert cli.main(["quantize", str(model), "--device", "cpu", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_model_is_not_thrown_away_for_itself(model: Path, capsys) -> None:
    for out in (model, model.parent):
        assert cli.main(["quantize", str(model), "--device", "cpu", "--out", str(out), "--overwrite"]) == 2
        assert "would throw away MODEL" in capsys.readouterr().err
    assert (model / "model_index.json").exists()

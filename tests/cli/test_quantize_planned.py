"""``diffaccel quantize --method mixdq``: one command makes the plan and the model, and goes on where it was killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_more
import torch
from diffusers import StableDiffusionPipeline

import diffaccel
from diffaccel import cli
from diffaccel.cli.planned import calibration_prompts
from diffaccel.quant.mixdq import work

OPTIONS = {"weight-bits": "5", "samples": "2", "probes": "1", "steps": "1", "ratios": "2",
           "skip": '["down_blocks","up_blocks"]'}  # fmt: skip
WORDS = ["--method", "mixdq", "--device", "cpu", "--size", "32x32"]
WORDS += [word for name, value in OPTIONS.items() for word in (f"--mixdq.{name}", value)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.make("sd").save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a\na red dog\n")
    return folder


def command(model: Path, out: Path, *more: str) -> list[str]:
    return ["quantize", str(model / "sd"), *WORDS, "--prompts", str(model / "prompts.txt"), "--out", str(out), *more]


def weights(out: Path) -> bytes:
    return (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_while_it_measures_and_while_it_saves(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    assert cli.main(command(model, tmp_path / "whole", "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["weight_average"] <= 5 and said["networks"][0]["share"] < 0.9
    measured = 0
    original = work.RecordFile.get

    def get(self, key, measure):
        nonlocal measured
        measured += 1
        if measured == 9:
            raise KeyboardInterrupt
        return original(self, key, measure)

    with monkeypatch.context() as patch:
        patch.setattr(work.RecordFile, "get", get)
        with pytest.raises(KeyboardInterrupt):
            cli.quantize.run(command(model, out)[1:])
    assert not (out / "model_index.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            StableDiffusionPipeline, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            cli.quantize.run(command(model, out)[1:])
    assert (out / "plan" / "plan.json").is_file()
    assert cli.main(command(model, out)) == 0
    assert "mean bits of a weight" in capsys.readouterr().out
    assert weights(out) == weights(tmp_path / "whole")
    assert cli.main(command(model, out)) == 2 and "has a finished model" in capsys.readouterr().err
    other = command(model, tmp_path / "whole")
    (tmp_path / "whole" / "plan" / "saved").unlink()
    other[other.index("--mixdq.weight-bits") + 1] = "4.5"
    assert cli.main(other) == 2 and "other options (weight_bits)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_folder_draws_and_its_plan_is_a_method(model: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(command(model, tmp_path / "out")) == 0
    loaded = diffaccel.load(tmp_path / "out")
    planned = diffaccel.accelerate(
        diffaccel.load(model / "sd"), diffaccel.quant.MixDQ(plan=str(tmp_path / "out" / "plan" / "plan.json"))
    )
    for pipe in (loaded, planned):
        pipe.set_progress_bar_config(disable=True)
    drawn = [tiny_more.result(pipe(**tiny.call_kwargs("sd"))).clone() for pipe in (loaded, planned)]
    assert torch.equal(*drawn)
    words = ["quantize", str(model / "sd"), "--method", "mixdq", "--device", "cpu", "--mixdq.plan"]
    again = [*words, str(tmp_path / "out" / "plan" / "plan.json"), "--out", str(tmp_path / "again")]
    assert cli.main(again) == 0 and weights(tmp_path / "again") == weights(tmp_path / "out")
    assert cli.main([*again[:-1], str(tmp_path / "out")]) == 2  # not empty


def test_what_is_to_be_thrown_away_stays_until_the_options_fit(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out" / "plan").mkdir(parents=True)
    kept = [tmp_path / "out" / name for name in ("model_index.json", "plan/saved", "plan/measured.jsonl")]
    for file in kept:
        file.touch()
    bad = command(model, tmp_path / "out", "--overwrite", "--mixdq.skip", '["no_such_block"]')
    assert cli.main(bad) == 2 and "matches no layer" in capsys.readouterr().err
    assert all(file.is_file() for file in kept)


def test_prompts_of_a_calibration(model: Path, tmp_path: Path, capsys) -> None:
    texts = calibration_prompts("emoji-flux", None, 32)
    assert len(set(texts)) >= 32 and all(", " in text for text in texts)
    assert cli.main(["quantize", str(model / "sd"), *WORDS, "--out", str(tmp_path / "out")]) == 2
    assert "--prompts is missing" in capsys.readouterr().err

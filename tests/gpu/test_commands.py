"""Every command that opens a model, once on a CUDA device: what a terminal starts takes the device by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from diffaccel.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZE = ("--size", "32", "--steps", "4")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs a command beside a folder "model", and returns what it printed as JSON."""
    monkeypatch.chdir(tmp_path)
    tiny.make("flux").save_pretrained(tmp_path / "model")
    Path("two.txt").write_text("a cat\na dog\n")

    def call(*words: str) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    "methods", [("fused_blocks",), ("w8a8",), ("w4a16", "capture"), ("spectrum", "capture"), ("tib", "capture")],
    ids=lambda methods: "+".join(methods),
)  # fmt: skip
def test_methods_by_name(run: Any, methods: tuple[str, ...]) -> None:
    chosen = [word for method in methods for word in ("--method", method)]
    record = run("sample", "a cat", "--model", "model", *SIZE, *chosen, "--out", "out")
    assert record["device"]["type"] == "cuda" and [m["name"] for m in record["settings"]["methods"]] == list(methods)


def test_a_quantized_folder_is_drawn_with(run: Any) -> None:
    assert run("quantize", "model", "--method", "w8a8", "--out", "small")["networks"][0]["layers"] > 0
    assert run("sample", "a cat", "--model", "small", *SIZE, "--out", "out")["device"]["type"] == "cuda"


def test_runs_are_compared_and_timed(run: Any) -> None:
    words = ("--model", "model", "--prompts", "two.txt")
    run("eval", "run", *words, "--accel", "plain:steps=4,size=32", "--out", "base")
    run("eval", "run", *words, "--accel", "capture:steps=4,size=32", "--out", "graphs")
    assert {row["n"] for row in run("eval", "paired", "graphs", "base", "--metrics", "ssim")["metrics"]} == {2}
    variants = ("plain:steps=4,size=32", "capture:steps=4,size=32")
    assert run("eval", "time", *variants, "--model", "model", "--prompt", "a cat", "--turns", "6")


def test_a_model_is_diagnosed(run: Any) -> None:
    assert run("doctor", "--model", "model")["device"] == "cuda"


def test_a_tuning_s_plan_is_drawn_with(run: Any) -> None:
    words = ("--prompts", "emoji-1000", "--methods", "spectrum,capture", "--budget", "60", "--dtype", "float32")
    run("tune", "model", *SIZE, *words, "--fail-if", "ssim<0.1", "--out", "tuned")
    record = run("sample", "a cat", "--model", "model", *SIZE, "--preset", "tuned/preset.json", "--out", "out")
    assert record["device"]["type"] == "cuda"

"""``diffaccel sample`` on a CUDA device: its defaults there, and noise that does not depend on the device."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffaccel.cli import main

pytestmark = pytest.mark.gpu


@pytest.fixture
def sample(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.make("flux").save_pretrained(tmp_path / "model")

    def call(out: str, *argv: str) -> dict:
        capsys.readouterr()
        words = ["sample", "two cats", "--num", "3", "--batch", "2", "--steps", "2", "--size", "32", "--json"]
        assert main([*words, "--model", "model", "--out", out, *argv]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize("sampler", [(), ("--sampler", "ancestral")], ids=["plain", "ancestral"])
def test_the_device_is_taken_and_the_noise_is_the_same(sample, sampler):
    cuda = sample("cuda", "--dtype", "float32", *sampler)
    cpu = sample("cpu", "--device", "cpu", *sampler)
    assert cuda["settings"]["device"] == cuda["device"]["type"] == "cuda" and cuda["device"]["name"]
    assert 0 < cuda["cost"]["peak_memory"] < 1 << 30 and "threads" not in cuda["settings"]
    assert {k: cuda["cost"][k] for k in ("nfe", "forwards")} == {k: cpu["cost"][k] for k in ("nfe", "forwards")}
    for image in cuda["images"]:
        one, other = (np.asarray(Image.open(f"{folder}/{image['file']}"), dtype=int) for folder in ("cuda", "cpu"))
        assert np.abs(one - other).max() <= 3  # other noise would differ by a hundred levels


def test_bfloat16_is_the_default_there_and_repeats(sample):
    one, other = sample("one"), sample("other")
    assert one["settings"]["dtype"] == "bfloat16" and one["images"] == other["images"]


def test_out_of_memory(sample, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        words = ["sample", "two cats", "--num", "64", "--batch", "64", "--steps", "1", "--size", "512"]
        assert main([*words, "--model", "model", "--out", "big"]) == 3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory" in capsys.readouterr().err


def test_a_captured_run_draws_the_same(sample):
    plain, captured = sample("plain", "--steps", "5"), sample("captured", "--steps", "5", "--method", "capture")
    assert captured["cost"]["graphs"]["replays"] > 0
    pixels = [[image["pixels_sha256"] for image in run["images"]] for run in (plain, captured)]  # files name the method
    assert pixels[0] == pixels[1]

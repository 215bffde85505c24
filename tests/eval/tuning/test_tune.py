"""``tune`` on a tiny pipeline: from prompts to a preset that the pipeline takes."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import diffaccel
from diffaccel.cli import main
from diffaccel.errors import DiffAccelError
from diffaccel.eval.tuning import tune
from diffaccel.eval.tuning.sizes import sizes_of, split
from diffaccel.runs import chunk

PROMPTS = [f"{number} cats" for number in range(18)]
CALL = {"size": (32, 32), "steps": 2, "threads": 1, "batch": 6}


@pytest.fixture(scope="module")
def pipe():
    return tiny.make("flux")


@pytest.fixture
def steady(monkeypatch):
    """A machine on which a call takes as long as its network calls."""
    honest = chunk._cost
    monkeypatch.setattr(chunk, "_cost", lambda *args: (cost := honest(*args)) | {"seconds": 0.1 + 0.1 * cost["calls"]})


@pytest.mark.slow
def test_a_preset_of_a_tiny_pipeline(pipe, steady, tmp_path):
    """Any loss is allowed, so that fewer steps are certified whatever random weights draw."""
    said = []
    tuned = tune(
        pipe, prompts=PROMPTS, fail_if="ssim<-1", methods=["euler"], budget=0.5, out=tmp_path, announce=said.append,
        **CALL,
    )  # fmt: skip
    assert "Budget 0.5 s" in said[0] and "6 prompts to choose by, 12 others" in said[0]
    preset = json.loads(tuned.path.read_text())
    point = preset["points"][tuned.default]
    assert tuned.default != "baseline" and point["call"]["steps"] == 1
    certificate = point["certificate"]
    assert certificate["count"] == 12 and certificate["baseline"] == "plain:steps=2"
    assert certificate["timing"]["ratio"]["value"] == pytest.approx(1.5)
    assert certificate["device"]["type"] == "cpu" and certificate["measures"]["ssim"]["low"] <= 1
    assert diffaccel.summary(pipe).methods == []
    seeded = {"prompt": "a cat", "height": 32, "width": 32, "output_type": "latent"}
    stock = pipe(
        **seeded, num_inference_steps=point["call"]["steps"], generator=torch.Generator().manual_seed(0)
    ).images
    diffaccel.accelerate(pipe, tuned.path)
    try:
        assert torch.equal(pipe(**seeded, generator=torch.Generator().manual_seed(0)).images, stock)
        with pytest.raises(DiffAccelError, match="has methods on it already"):
            tune(pipe, prompts=PROMPTS, out=tmp_path)
    finally:
        diffaccel.remove(pipe)
    with pytest.raises(DiffAccelError, match="holds a tuning with"):
        tune(pipe, prompts=PROMPTS, fail_if="psnr<3", methods=["euler"], budget=0.5, out=tmp_path, **CALL)


def test_budgets_and_prompts():
    small, large = sizes_of(60, 1.2, 1000), sizes_of(1800, 1.2, 1000)
    assert small.held_out < large.held_out and small.rungs[-1] < large.rungs[-1] and large.search == 900
    prompts = [*PROMPTS, *PROMPTS]
    parts = split(prompts, sizes_of(60, 1.2, 18), 0)
    assert not set(parts["tuning"]) & set(parts["held-out"]) and len(set(parts["held-out"])) == 12
    assert split(prompts, sizes_of(60, 1.2, 18), 0) == parts != split(prompts, sizes_of(60, 1.2, 18), 1)
    with pytest.raises(DiffAccelError, match=r"at least 18 different prompts, .* got 5"):
        sizes_of(60, 1.2, 5)
    with pytest.raises(DiffAccelError, match="budget is 0 seconds"):
        sizes_of(0, 1.2, 100)


@pytest.mark.slow
def test_what_cannot_be_tuned_for_is_refused_before_anything_is_drawn(pipe, tmp_path, capsys):
    for rule, match in (
        ("fd>3", "Unknown metric of a tuning 'fd'"),
        ("ssimm<0.9", "Did you mean 'ssim'"),
        ("ssim<", "wants a number"),
    ):
        with pytest.raises(DiffAccelError, match=match):
            tune(pipe, prompts=PROMPTS, fail_if=rule, out=tmp_path / "a", **CALL)
    assert not (tmp_path / "a").exists()
    with pytest.raises(DiffAccelError, match="tune takes no such setting"):
        tune(pipe, prompts=PROMPTS, step=3)
    assert main(["tune", "--methods", "bon", "--out", str(tmp_path / "b")]) == 2
    assert "'bon' is a search" in capsys.readouterr().err

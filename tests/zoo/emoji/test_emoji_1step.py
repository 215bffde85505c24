"""The job of emoji-flux-1step: its prompts, its options, and a packed student that is loaded by its name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import diffaccel
from diffaccel import zoo
from diffaccel.eval.sets import prompts as prompt_sets
from scripts.zoo.emoji_1step import export, job, prompts


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--recipe", "tiny", "--device", "cpu", *map(str, arguments)])
    job.main()


def test_prompts_are_of_every_kind_and_leave_out_those_of_evaluations() -> None:
    vocabulary = zoo.vocabulary_of("emoji-flux")
    assert vocabulary is not None
    held_out = set(prompt_sets.read("emoji-1000").texts)
    made = prompts.build(vocabulary, 2000, held_out)
    assert len(set(made)) == 2000 and not held_out & set(made)
    assert made[:50] == prompts.build(vocabulary, 50, held_out)
    excluded = set(made[:3])
    assert not excluded & set(prompts.build(vocabulary, 2000, excluded))
    for words, share in ((vocabulary.numbers, 0.2), (vocabulary.colours, 0.2)):
        found = sum(text.split()[0] in words for text in made) / len(made)
        assert found == pytest.approx(share, abs=0.05)
    words = {word for text in made for word in vocabulary.unknown([text])}
    assert not words  # plurals included, the model has seen them all


def test_options_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(job, "base_pipeline", lambda: pytest.fail("loaded"))
    for changes, text in (
        (["--set", "lr=-1"], "SIM.lr is -1"),
        (["--set", "alhpa=1"], "Did you mean 'alpha'"),
        (["--steps", "0"], "student_steps is 0"),
    ):
        with pytest.raises(SystemExit, match=text):
            call(monkeypatch, "--work", tmp_path, *changes)
    with pytest.raises(SystemExit, match="Did you mean 'full'"):
        monkeypatch.setattr(sys, "argv", ["job", "--recipe", "ful", "--work", str(tmp_path)])
        job.main()


@pytest.mark.slow
def test_the_whole_job_leaves_a_small_model_that_is_loaded_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    common = ("--work", work, "--out", out, "--minutes", 20, "--score-seconds", 1, "--set", "lr=1e-3")
    call(monkeypatch, *common, "--stages", "score")
    assert "score: waits for the student" in capsys.readouterr().out
    call(monkeypatch, *common)
    report = json.loads((out / "report.json").read_text())
    assert {"teacher, 2 steps", "student", "student, packed"} <= report.keys() and report["turns"] == 2
    assert len(list(out.iterdir())) <= 8
    models = tmp_path / "zoo"
    models.mkdir()
    shutil.copytree(export.packed_base(), models / export.BASE)
    (placed,) = export.receive(out, models)
    assert placed.name == "emoji-flux-1step"
    assert json.loads((placed / "card.json").read_text())["bytes"]["packed"] <= export.LARGEST
    monkeypatch.setattr(zoo, "_ROOT", models)
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "cache"))
    assert "emoji-flux-1step" in zoo.names() and zoo.call_defaults("emoji-flux-1step")["true_cfg_scale"] == 1.0
    loaded, base = diffaccel.load("emoji-flux-1step"), diffaccel.load("emoji-flux")
    assert type(loaded.scheduler).__name__ == "SIMOneStepScheduler"
    own, theirs = loaded.transformer.state_dict(), base.transformer.state_dict()
    assert own.keys() == theirs.keys() and any(not torch.equal(own[key], theirs[key]) for key in own)
    vae = zip(loaded.vae.parameters(), base.vae.parameters(), strict=True)
    assert all(torch.equal(ours, their) for ours, their in vae)

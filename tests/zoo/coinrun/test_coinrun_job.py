"""The job of the CoinRun model: its commands, and weights that travel."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from diffaccel.distill.next_frame.train import train_forcing
from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame import beginnings
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.training.loop import TrainingRun
from diffaccel.zoo import packing
from scripts.zoo.coinrun import card, export, job, probe, recipe


def _call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["job", *map(str, arguments)])
    job.main()


def test_unknown_names_and_a_missing_simulator_are_said(monkeypatch, tmp_path):
    base = ("--minutes", 1, "--work", tmp_path / "work", "--device", "cpu", "--data", tmp_path)
    with pytest.raises(SystemExit, match="Did you mean 'teacher'"):
        _call(monkeypatch, "--recipe", "cpu", *base, "--stages", "teachr")
    with pytest.raises(SystemExit, match="Did you mean 'full'"):
        _call(monkeypatch, "--recipe", "ful", *base)
    with pytest.raises(SystemExit, match=r"scripts\.zoo\.coinrun\.fetch"):
        _call(monkeypatch, "--recipe", "cpu", *base)


def test_a_student_waits_for_its_teacher(monkeypatch, tmp_path, capsys):
    _call(monkeypatch, "--recipe", "cpu", "--minutes", 1, "--work", tmp_path, "--device", "cpu", "--stages", "student")
    assert "waits for the teacher" in capsys.readouterr().out
    assert json.loads((tmp_path / "progress.json").read_text()) == {}


def test_the_network_has_the_size_that_is_promised():
    model = NextFrameTransformer(**recipe.get("full").model)
    assert 6e6 < sum(p.numel() for p in model.parameters()) < 8e6


@pytest.fixture
def trained(tmp_path):
    """A work folder with a teacher of no steps."""
    small = recipe.get("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NextFrameTransformer(**small.model)
    run = TrainingRun(tmp_path / "work", "teacher", {"transformer": model}, small.forcing.plan)
    run.save()
    return tmp_path / "work", model


def test_weights_travel_in_parts_and_go_on_after_a_warmup(trained, tmp_path, monkeypatch):
    work, model = trained
    monkeypatch.setattr(export, "PART_BYTES", 2**20)
    out = tmp_path / "out"
    out.mkdir()
    parts = export.send(work, out)
    assert len(parts) > 2 and all(part.stat().st_size < 2**20 + 2**18 for part in parts)
    again = export.received(out, "teacher")
    assert all(torch.equal(again[name], p) for name, p in model.named_parameters())
    (out / "progress.json").write_text(json.dumps(export.progress_of(work)))
    export.restore(out, tmp_path / "second")
    assert export.progress_of(tmp_path / "second")["teacher"] == export.progress_of(work)["teacher"]
    pipe = export.pipeline(recipe.get("cpu"), again, consistency=True)
    pipe.save_pretrained(tmp_path / "pipe")
    assert type(NextFramePipeline.from_folder(tmp_path / "pipe").scheduler).__name__ == "FlowMatchLCMScheduler"


def test_the_packed_model_has_its_card_and_what_videos_begin_with(trained, tmp_path, monkeypatch):
    work, model = trained
    out = tmp_path / "out"
    out.mkdir()
    export.send(work, out)
    given = torch.randint(256, (3, 8, 3, 64, 64), dtype=torch.uint8)
    actions = torch.randint(9, (3, 8))
    monkeypatch.setattr(export, "make_forks", lambda *_, **__: SimpleNamespace(given=given, given_actions=actions))
    packed = export.pack(recipe.get("cpu"), out, "teacher", tmp_path / "zoo", tmp_path)
    size = sum(file.stat().st_size for file in packed.rglob("*") if file.is_file())
    assert size < 1.4 * sum(p.numel() for p in model.parameters()) + given.nbytes + 2**16
    told = json.loads((packed / "card.json").read_text())
    assert told["state"] == "not measured yet" and "Kenney" in (packed / "NOTICE").read_text()
    plain = packing.unpack(packed, tmp_path / "plain")
    read = beginnings.read(plain, (3, 64, 64))
    assert torch.equal(read[2].actions, actions[2]) and torch.equal(
        ((read[2].frames + 1) * 127.5).round(), given[2].float()
    )


def test_what_the_model_is_accepted_by():
    by_ahead = {"1": 31.0, "4": 20.0, "8": 16.0}
    row = {"steps": 4, "PSNR, seen before": by_ahead, "delta-PSNR": {"4": 5.0}, "actions read, ratio": 0.9,
           "PSNR, seen before, action changes": by_ahead}  # fmt: skip
    report = {
        "student": [row], "references": {"repeat: PSNR, seen before, action changes": {"4": 15.0, "8": 16.5}},
        "student, long videos": {f"late over early: {what}": value for what, value in
                                 (("mean difference of frames", 1.3), ("actions read", 1.0))},
    }  # fmt: skip
    table = card.acceptance(report, "student", 7_000_000)
    failed = [line["check"] for line in table if not line["passed"]]
    assert len(table) == 8 and failed == [table[4]["check"], table[5]["check"]] and table[4]["value"] == -0.5
    assert card.acceptance(report, "teacher", 1) == []


def test_a_folder_without_weights_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["export", "--receive", str(tmp_path)])
    with pytest.raises(SystemExit, match="no weights of the student"):
        export.main()


def test_random_clips_train_the_small_recipe(tmp_path):
    """What the probe runs on a GPU, without the compiler."""
    from dataclasses import replace

    small = recipe.get("cpu")
    plan = replace(small.forcing.plan, samples=small.forcing.batch, seconds=1e9)
    model = NextFrameTransformer(**{**small.model, "num_layers": 1})
    run = train_forcing(model, probe.RandomClips(small), replace(small.forcing, plan=plan), tmp_path)
    assert run.step == 1
    with pytest.raises(DiffAccelError, match="full"):
        recipe.get("fulll")

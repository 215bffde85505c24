"""The job: stages that cannot run yet say so and leave nothing broken."""

import sys

import pytest

from scripts.zoo.emoji import job


def _call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["job", "--recipe", "cpu", "--device", "cpu", *map(str, arguments)])
    job.main()


def test_unknown_stage_and_recipe(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="Did you mean 'flow'"):
        _call(monkeypatch, "--minutes", 1, "--work", tmp_path, "--stages", "flwo")
    monkeypatch.setattr(sys, "argv", ["job", "--recipe", "ful", "--minutes", "1", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="Did you mean 'full'"):
        job.main()


def test_an_empty_work_folder_waits_for_what_is_missing(monkeypatch, tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    _call(monkeypatch, "--minutes", 1, "--work", work, "--out", out, "--stages", "flow,export,score", "--last")
    said = capsys.readouterr().out
    assert "waits for vae, text_encoder, tokenizer, tokenizer_2" in said and "no flow model yet" in said
    assert (out / "curves.jsonl").is_file() and not list(out.glob("zoo.tar*"))

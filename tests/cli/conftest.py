"""Folders of tiny random pipelines, as ``--model`` takes them, and a way to run a command in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from diffaccel.cli import main


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with the pipelines ``flux`` and ``sd``."""
    root = tmp_path_factory.mktemp("models")
    for family in ("flux", "sd"):
        tiny.make(family).save_pretrained(root / family)
    return root


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Outcome]:
    """``run("list", "--json")``: a command in this process, as a shell would see it."""
    monkeypatch.delenv("DIFFACCEL_DEBUG", raising=False)

    def call(*argv: object) -> Outcome:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture
def sample(run, models, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """``sample("a cat", "--num", 2)``: the command on the tiny FLUX at 32 px and two steps, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object, model: str = "flux") -> Outcome:
        return run("sample", "--model", models / model, "--steps", 2, "--size", 32, "--threads", 1, *argv)

    return call

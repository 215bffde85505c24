"""What needs no weights is refused before they are read, and before torch is imported where it can be."""

from __future__ import annotations

import itertools

import pytest

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import find
from diffaccel.runs.early_checks import check_early
from diffaccel.runs.request import Request
from tests.layout import tree

CODE = """
import sys
from diffaccel.cli import main
try:
    main({words!r})
except SystemExit:
    pass
print(*sorted({{"torch", "diffusers", "transformers", "numpy"}} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "output", "loaded"),
    [
        (["--help"], "options of --sampler heun", set()),
        ([], "No prompt was given", set()),
        (["a cat", "--out", "file"], "'file' cannot be written", set()),
        (["a cat", "--model", "emoji-fluks"], "Unknown model", set()),
        (["a cat", "--size", "50x40"], "nearest valid size is 48x32", {"torch", "numpy"}),
    ],
)
def test_a_refusal_loads_little(tmp_path, words, output, loaded):
    (tmp_path / "file").touch()
    done = tree.python("-c", CODE.format(words=["sample", *words]), cwd=tmp_path)
    assert output in done.stdout + done.stderr
    assert set(done.stderr.splitlines()[-1].split()) <= loaded


@pytest.mark.parametrize("name", ["flux", "sd"])
def test_the_files_give_the_answer_of_the_pipeline(models, name):
    pipe = diffaccel.load(models / name)
    for size in itertools.product((8, 20, 32, 36), repeat=2):
        answers = []
        for check in (
            lambda size=size: find(pipe).check_size(pipe, *size),
            lambda size=size: check_early(Request(prompts=("a cat",), model=str(models / name), size=size)),
        ):
            try:
                answers.append(check())
            except DiffAccelError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]


def test_what_a_call_does_not_take_is_told_before_the_weights_are_read(sample, monkeypatch):
    monkeypatch.setattr("diffaccel.runs.loading.open_pipeline", None)
    assert "FluxPipeline makes images, and takes no frames" in sample("a cat", "--frames", 9, "--out", "run").err
    assert "whose call takes no class" in sample("--class", "cat", "--out", "run").err

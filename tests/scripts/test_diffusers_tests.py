"""diffusers' own tests on wrapped pipelines: outcomes side by side, and a whole run on a checkout of one test file."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked_commands import forked_commands
from PIL import Image

from scripts.diffusers_tests import plugin
from scripts.diffusers_tests.__main__ import main
from scripts.diffusers_tests.outcomes import Comparison, markdown, outcomes_of
from scripts.diffusers_tests.plugin import digest

TESTS = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def make(clips):
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(network, DDPMScheduler(clip_sample=clips))


def draw(clips):
    pipe = make(clips)
    assert type(pipe).__name__ == "DDPMPipeline" and isinstance(pipe, DDPMPipeline)
    generator = torch.Generator().manual_seed(0)
    assert pipe(generator=generator, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_clipped():
    draw(True)


def test_plain():
    draw(False)


def test_of_a_folder_that_is_not_here():
    DDPMPipeline.from_pretrained("nobody/nothing")
"""


def row(outcome: str, outputs: list[str], **others: Any) -> dict[str, Any]:
    return {"outcome": outcome, "outputs": outputs, "paths": ["native"] * len(outputs), **others}


def test_outcomes_side_by_side() -> None:
    stock = {
        "equal": row("passed", ["a", "b"]),
        "another": row("passed", ["a", "b"]),
        "refused": row("passed", ["a"]),
        "broken": row("passed", ["a"]),
        "skipped": row("skipped", []),
        "missing": row("failed", [], message="OSError: no such folder"),
    }
    refusal = "diffaccel.errors.UnsupportedBySampler: one two three four five six seven eight nine"
    wrapped = {
        "equal": row("passed", ["a", "b"]),
        "another": row("passed", ["a", "c"]),
        "refused": row("failed", [], message=refusal),
        "broken": row("failed", [], message="ValueError: bad"),
        "missing": row("failed", [], message="OSError: no such folder"),
    }
    c = Comparison.of("euler", stock, wrapped)
    assert (c.stock_passes, c.passed, c.refused, c.failed, c.equal, c.outputs) == (4, 2, 1, 1, 3, 4)
    assert c.differing == ["another"] and set(c.tests) == {"refused", "broken"} and c.paths == {"native": 4}
    assert outcomes_of(stock) == {"passed": 4, "skipped": 1, "missing": 1}
    assert "| `euler` | 4 | 2 | 1 | 1 | 3 of 4 | native 4 |" in markdown(stock, [c])


def test_digests_tell_every_bit_apart() -> None:
    zeros, picture = torch.zeros(2, 2), Image.new("RGB", (2, 2))
    outputs = [
        zeros, -zeros, zeros.double(), zeros.reshape(4), np.zeros((2, 2), np.float32), picture, [zeros], {"a": zeros},
        {"b": zeros}, [picture, None], torch.zeros(0), zeros.bfloat16(),
    ]  # fmt: skip
    assert len({digest(output) for output in outputs}) == len(outputs)
    assert digest({"a": [zeros, picture]}) == digest({"a": [torch.zeros(2, 2), picture.copy()]})


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes of the script begin with the libraries imported, in the environment that it gives them."""
    folder, root = tmp_path / "out", Path(__file__).resolve().parents[2]
    environment = {
        "HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_TEST_DEVICE": "cpu",
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    imported = ("diffusers:DDPMPipeline,DDPMScheduler,UNet2DModel,FluxPipeline", "pytest", "diffaccel.compose")
    with forked_commands(environment, imported, ("DIFFACCEL_CONFIG", "DIFFACCEL_RECORD")) as env:
        monkeypatch.setenv("PATH", env["PATH"])
        monkeypatch.setattr(sys, "executable", shutil.which("python", path=env["PATH"]))
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run in processes of their own, one for each method; what starts and compares them does not."""
    tests = tmp_path / "checkout" / "tests" / "pipelines"
    tests.mkdir(parents=True)
    (tests / "test_them.py").write_text(TESTS)
    (tmp_path / "checkout" / "setup.py").write_text('setup(\n    version="9.9.9",\n)\n')
    words = ["--diffusers-tests", tmp_path / "checkout", "--folder", tmp_path / "out", "--select", ""]
    words += ["--out", tmp_path / "record.json"]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["diffusers_tests", *map(str, words), *more])
        main()
        return capsys.readouterr().out

    said = run("--methods", "scheduler")
    assert "3 tests on the stock pipelines: 2 pass, 0 are skipped, 1 need" in said
    assert "| `scheduler` | 2 | 2 | 0 | 0 | 2 of 2 | native 2 |" in said
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["settings"]["tests_of"] == "9.9.9"
    stock = (tmp_path / "out" / "stock.jsonl").read_text()
    assert len(stock.splitlines()) == 3
    run("--methods", "euler")  # of the stock pipelines nothing is left to run
    assert stock == (tmp_path / "out" / "stock.jsonl").read_text()
    assert json.loads((tmp_path / "record.json").read_text())["methods"]["euler"]["refused"] == 1


def test_what_another_processor_ran_is_run_again(tmp_path, monkeypatch):
    rows = [{"test": "a", "processor": plugin.PROCESSOR}, {"test": "b", "processor": "another"}, {"test": "c"}]
    monkeypatch.setattr(plugin, "RECORD", tmp_path / "rows.jsonl")
    plugin.RECORD.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [SimpleNamespace(nodeid=name) for name in "abcd"]
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    plugin.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert [item.nodeid for item in items] == ["b", "c", "d"] and [item.nodeid for item in left_out] == ["a"]

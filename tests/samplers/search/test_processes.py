"""Several processes on one search: the files of one alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.samplers.search import launched as search_launched

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(tmp_path: Path) -> None:
    """With calls of a fixed number of rows every process sees the same numbers to the bit."""
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}", "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(
        [sys.executable, *LAUNCH, str(ROOT / "tests/samplers/search/launched.py"), str(tmp_path / "two")],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    search_launched.main(tmp_path / "one", shared=False)
    alone = torch.load(tmp_path / "one" / "0.pt")
    shares = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1)]
    for share in shares:
        assert torch.equal(share["images"], alone["images"])
        torch.testing.assert_close(share["again"], alone["images"], rtol=0, atol=1e-5)
        assert share["report"]["search"]["pictures"] == alone["report"]["search"]["pictures"]
    assert sum(share["nfe"] for share in shares) == alone["nfe"], "each made a part"
    assert all(share["nfe"] < 0.7 * alone["nfe"] for share in shares)
    one, two = (sorted((tmp_path / name / "search").iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for ours, theirs in zip(one, two, strict=True):
        if ours.name not in ("rewards.jsonl", "trace.json"):
            assert ours.read_bytes() == theirs.read_bytes(), ours.name
    lines = [(tmp_path / name / "search" / "rewards.jsonl").read_text().splitlines()[1:] for name in ("one", "two")]
    assert lines[0] == lines[1]  # but for the first, which tells the folder and that it was shared

"""Real processes: a run stopped at any moment, or shared by several, ends with the files of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@pytest.fixture
def start(models, tmp_path):
    """Start the command in a process of its own; processes that a test leaves behind are ended."""
    started = []

    def call(*argv: object, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, "diffaccel", "sample", "a red apple", "two cats", "--model",
                   models / "flux", "--steps", 2, "--size", 32, "--threads", 1, *argv]  # fmt: skip
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [str(word) for word in command], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + TIMEOUT
    while not path.exists():
        if process.poll() is not None or time.monotonic() > limit:
            pytest.fail(f"{path.name} never came: {process.communicate()}")
        time.sleep(0.002)


def test_stopped_and_killed_runs_continue(start, sample, tmp_path):
    options = ("--num", 16, "--batch", 2, "--sampler", "ancestral")  # sixteen chunks
    whole = sample("a red apple", "two cats", *options, "--out", "whole", "--json").json
    markers = tmp_path / "run" / ".chunks"

    process = start(*options, "--out", "run")
    wait_for(markers / "00002.json", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130
    assert "the same command continues" in process.stderr.read()
    after_interrupt = len(list(markers.iterdir()))
    assert 3 <= after_interrupt < 14

    process = start(*options, "--out", "run")
    wait_for(markers / f"{after_interrupt + 2:05d}.json", process)
    process.kill()
    process.wait(TIMEOUT)
    left = list(markers.glob("*.json"))
    assert after_interrupt < len(left) < 16
    kept = {path: path.stat().st_mtime_ns for i in range(2 * len(left)) if (path := tmp_path / f"run/{i:05d}.png")}

    record = sample("a red apple", "two cats", *options, "--out", "run", "--json").json
    assert record["images"] == whole["images"] and record["fingerprint"] == whole["fingerprint"]
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {k: record["cost"][k] for k in ("nfe", "forwards")} == {k: whole["cost"][k] for k in ("nfe", "forwards")}


def test_two_processes_make_the_same_files(start, sample, tmp_path):
    options = ("--num", 3, "--batch", 2, "--sampler", "heun", "--device", "cpu")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m")
    process = start(*options, "--out", "shared", "--json", launcher=launch)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    shared = json.loads(out)  # one object: only one process speaks
    alone = sample("a red apple", "two cats", *options, "--out", "alone", "--json").json
    assert shared["processes"] == 2 and alone["processes"] == 1
    assert shared["images"] == alone["images"]
    assert files(tmp_path / "shared") == files(tmp_path / "alone")

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


LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.json"}


SAMPLE = ("sample", "a red apple", "two cats", "--steps", 2, "--size", 32)


@pytest.fixture
def start(models, tmp_path):
    """Start the command in a process of its own; processes that a test leaves behind are ended."""
    started = []

    def call(
        *argv: object, launcher: tuple[str, ...] = ("-m",), command: tuple[object, ...] = SAMPLE
    ) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, "diffaccel", *command, "--model", models / "flux", "--threads", 1, *argv]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_processes_make_the_same_files(start, sample, tmp_path):
    options = ("--num", 3, "--batch", 2, "--sampler", "heun", "--device", "cpu")
    process = start(*options, "--out", "shared", "--json", launcher=(*LAUNCH, "2", "-m"))
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    shared = json.loads(out)  # one object: only one process speaks
    alone = sample("a red apple", "two cats", *options, "--out", "alone", "--json").json
    assert shared["processes"] == 2 and alone["processes"] == 1
    assert shared["images"] == alone["images"]
    assert files(tmp_path / "shared") == files(tmp_path / "alone")


EVAL = ("eval", "run", "--prompts", "p.txt", "--batch", 2, "--latents", "--device", "cpu")
WAY = ("--accel", "ancestral:steps=2,size=32")
PROCESSES = 3


@pytest.fixture
def evaluate(run, models, tmp_path, monkeypatch):
    """``eval run`` in this process, in an empty folder with twenty prompts: ten chunks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))

    def call(*argv: object):
        done = run(*EVAL, "--model", models / "flux", "--threads", 1, "--json", *argv)
        assert done.status == 0, done.err
        return done.json

    return call


@pytest.mark.slow
def test_eval_run_makes_the_same_files_by_several_processes(start, evaluate, tmp_path):
    process = start(*WAY, "--out", "shared", "--json", launcher=(*LAUNCH, str(PROCESSES), "-m"), command=EVAL)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    shared, whole = json.loads(out), evaluate(*WAY, "--out", "whole")
    assert len(whole["images"]) == 20 and all("latents_sha256" in image for image in whole["images"])
    assert shared["processes"] == PROCESSES and shared["images"] == whole["images"]
    assert files(tmp_path / "shared") == files(tmp_path / "whole")


@pytest.mark.slow
def test_eval_run_goes_on_after_a_kill_at_any_chunk(start, evaluate, tmp_path):
    """Killed twice, after the first chunk and after the seventh of ten, each time before the last is whole."""
    whole, markers = evaluate(*WAY, "--out", "whole"), tmp_path / "run" / ".chunks"
    for last in (0, 6):
        process = start(*WAY, "--out", "run", command=EVAL)
        wait_for(markers / f"{last:05d}.json", process)
        process.kill()
        process.wait(TIMEOUT)
    assert 7 <= len(list(markers.glob("*.json"))) < 10
    made = evaluate(*WAY, "--out", "run")
    assert made["images"] == whole["images"] and files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.slow
def test_an_early_stop_is_the_same_by_several_processes(start, evaluate, tmp_path):
    """Ranks agree on when to stop, also where one of them has no chunk before a look."""
    evaluate("--accel", "plain:steps=2,size=32", "--out", "base")
    rule = (
        "--accel",
        "dpmpp2m:steps=1,size=32",
        "--baseline",
        "base",
        "--until",
        "ssim within 0.9",
        "--looks",
        "16,18",
    )
    process = start(*rule, "--out", "shared", "--json", launcher=(*LAUNCH, str(PROCESSES), "-m"), command=EVAL)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    shared, alone = json.loads(out), evaluate(*rule, "--out", "alone")
    assert alone["until"]["verdict"] == "equivalent" and len(alone["images"]) in (16, 18)
    assert shared["until"] == alone["until"] and shared["images"] == alone["images"]
    assert files(tmp_path / "shared") == files(tmp_path / "alone")

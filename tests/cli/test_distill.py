"""The command ``distill``: resumes, stops by time, and leaves a student that a new process loads."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from diffaccel import registry
from diffaccel.cli import main
from diffaccel.cli.distill import UNFINISHED, looks
from diffaccel.distill.sim import SIM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.make("flux").save_pretrained(folder)
    return folder


def options(model: Path, out: Path, *more: str) -> list[str]:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("a red apple\na blue house\na cat\n", encoding="utf-8")
    size = str(tiny.call_kwargs("flux")["height"])
    base = ["distill", str(model), "--prompts", str(prompts), "--size", size, "--out", str(out)]
    return [*base, "--sim.steps", "2", "--sim.batch", "2", "--sim.ema-pictures", "0", *more]


@pytest.mark.slow
def test_a_student_is_made_and_a_new_process_draws_with_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(model, tmp_path / "run", "--seconds", "0.000001")) == UNFINISHED
    assert main(options(model, tmp_path / "run")) == 0
    assert "2 of 2 steps" in capsys.readouterr().out
    draw = "import sys, diffaccel; p = diffaccel.load(sys.argv[1]); print(p.scheduler.__class__.__name__)"
    command = [sys.executable, "-c", draw, str(tmp_path / "run" / "student")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SIMOneStepScheduler"


@pytest.mark.slow
def test_a_run_is_looked_at_and_its_student_of_two_steps_draws(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--sim.student-steps", "2", "--evaluate", "2", "--evaluate-prompts", "3", "--judge", "tiny"]
    assert main(options(model, tmp_path / "run", *more)) == 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    looked = [entry for entry in entries if "fd" in entry]
    assert [entry["pictures"] for entry in looked] == [2, 4] and all("teacher_error" in entry for entry in looked)
    capsys.readouterr()
    size = str(tiny.call_kwargs("flux")["height"])
    draw = ["sample", "a cat", "--size", size, "--steps", "2", "--model", str(tmp_path / "run" / "student")]
    assert main([*draw, "--out", str(tmp_path / "drawn")]) == 0
    assert "2 steps, 2 NFE" in capsys.readouterr().out


def test_when_a_run_is_looked_at_is_said_before_it_begins() -> None:
    config = SIM(steps=10, batch=4, ema_pictures=0)
    assert looks(0, config, "none") == "Not looked at while it trains (--evaluate 0): log.jsonl gets losses alone."
    assert looks(50, config, "none") == (
        "Never looked at: --evaluate is 50, and the run ends after 40 drawings. Give fewer."
    )
    assert looks(1, config, "none").startswith("Looked at after every 4 of 40 drawings: log.jsonl gets the convergence")
    assert looks(9, config, "tiny").startswith("Looked at after every 8 of") and "the judge tiny" in looks(
        9, config, "tiny"
    )


@pytest.mark.slow
def test_processes_that_share_out_the_weights_leave_a_student(model: Path, tmp_path: Path) -> None:
    words = options(model, tmp_path / "run", "--sharded", "--threads", "1", "--evaluate", "2", "--device", "cpu")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "diffaccel",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *words], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 steps" in done.stdout and (tmp_path / "run" / "checkpoint-2").is_dir()
    assert main(options(model, tmp_path / "whole", "--device", "cpu")) == 0
    ours, theirs = (
        load_file(tmp_path / name / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("run", "whole")
    )
    assert ours.keys() == theirs.keys() and all(value.shape == theirs[name].shape for name, value in ours.items())
    assert '"distance@0.5"' in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.slow
def test_a_student_of_trajectories_is_what_sim_begins_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in options(model, tmp_path / "tscd") if not word.startswith("--sim.")][:8]
    own = ["--tscd.steps", "2", "--tscd.batch", "2", "--tscd.ema-pictures", "0", "--tscd.segments", "2,1"]
    assert main([*words, "--method", "tscd", *own, "--tscd.grid", "2", "--evaluate", "2", "--judge", "none"]) == 0
    assert "trajectory_error" in (tmp_path / "tscd" / "log.jsonl").read_text()
    init = ["--init", str(tmp_path / "tscd" / "student")]
    assert main(options(model, tmp_path / "sim", *init)) == 2
    assert "--sim.noise-ratio 1000" in capsys.readouterr().err
    assert main(options(model, tmp_path / "sim", *init, "--sim.noise-ratio", "1000")) == 0
    known = json.loads((tmp_path / "sim" / "student" / "student.json").read_text())
    assert known["begins_with"]["options"]["segments"] == [2, 1]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--evaluate", "-1"], "--evaluate is -1"),
        (["--method", "sid"], "Unknown method of training 'sid'"),
        (["--preset", "sied"], "Did you mean 'sid'"),
        (["--sim.alhpa", "1"], "Did you mean 'alpha'"),
        (["--rbf.budget", "1"], "--rbf.budget is no option of 'sim'"),
        (["--sim.floor", "7"], "SIM.floor"),
        (["--sharded", "--evaluate", "2"], "Add --judge none"),
        (["--judge", "tiny"], "Add --evaluate N"),
        (["--method", "tscd", "--preset", "sid"], "'tscd' has no presets"),
        (["--method", "tscd", "--tscd.segments", "2,4"], "the numbers must fall"),
        (["--method", "tscd", "--sim.steps", "4"], "--sim.steps is no option of 'tscd'"),
    ],
)
def test_errors_name_what_is_wrong(
    more: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", "--out", str(tmp_path), *more]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["./sd3"], "--prompts is missing: what './sd3'"),
        (["--seconds", "0"], "--seconds is 0; it must be above 0"),
        (["--seed", "-1"], "--seed is -1; it must be from 0"),
        (["--sim.lr", "1e300"], "SIM.lr is 1e+300"),
        (["--sim.batch", str(10**12)], "SIM.batch is 1000000000000; it must be at most 1,048,576"),
        (["--sim.student-steps", str(10**9)], "it must be at most 1,000"),
        (["--method", "tscd", "--tscd.grid", "0"], "TSCD.grid is 0; it must be from 1 to 10,000"),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_loaded(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", *words, "--out", str(tmp_path / "run")]) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_runs_do_not_write_one_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffaccel.folder_lock import FolderLock

    out = tmp_path / "run"
    out.mkdir()
    lock = FolderLock(out)
    lock.acquire()
    try:
        assert main(options(model, out)) == 2
    finally:
        lock.release()
    assert "is being written by another run" in capsys.readouterr().err and not list(out.iterdir())
    leftover = out / ".checkpoint.safetensors.0123abcd.tmp"
    (out / "student").mkdir()
    for path in (leftover, out / ".evaluation.safetensors.0123abcd.tmp", out / "student" / ".README.md.0123abcd.tmp"):
        path.touch()
    assert main(options(model, out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "log.jsonl", "student"]
    assert not list((out / "student").glob(".*"))


@pytest.mark.slow
def test_a_full_disk_is_named_as_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffaccel.distill.learning.save_tensors", full)
    assert main(options(model, tmp_path / "run")) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.slow
def test_training_has_as_many_threads_as_were_asked_for(model: Path, tmp_path: Path, monkeypatch) -> None:
    before, seen = torch.get_num_threads(), []

    def train(*_: object, **options: object) -> SimpleNamespace:
        seen.append(torch.get_num_threads())
        return SimpleNamespace(step=2, pictures=4, seconds=0.0)

    monkeypatch.setattr(registry, "trainer", lambda name: (SIM, train))
    assert main(options(model, tmp_path / "run", "--threads", str(before + 1))) == 0
    assert seen == [before + 1] and torch.get_num_threads() == before

"""Where commands write is checked before they compute anything."""

from __future__ import annotations

import os

import pytest

from diffaccel import terminal
from diffaccel.files import write_text


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("eval", "time", "plain", "plain:steps=8"), "--out"),
        (("eval", "stats", "photos"), "--out"),
        (("eval", "fid", "photos", "photos"), "--json"),
        (("eval", "fid", "photos", "photos"), "--cache"),
        (("eval", "compare", "base", "run"), "--report"),
    ],
)
@pytest.mark.parametrize("place", ["file.txt/deeper/x.json", "folder.json", "pipe.json", ""])
def test_an_output_that_cannot_be_written_is_told_first(run, tmp_path, monkeypatch, command, option, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    if place == "folder.json" and option in ("--report", "--cache"):
        return
    done = run(*command, option, place)
    assert done.status == 2 and option in done.err and done.err.count("\n") == 1
    assert ("cannot be written (" in done.err) == bool(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder.json", "pipe.json"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no place here takes no files from everyone")
@pytest.mark.parametrize(
    "command",
    [
        ("sample", "a cat"),
        ("eval", "run", "--prompts", "a.txt"),
        ("eval", "time", "plain", "plain:steps=8"),
        ("tune", "emoji-flux"),
        ("distill", "emoji-flux", "--prompts", "a.txt"),
        ("quantize", "emoji-flux", "--method", "w8a8"),
        ("quantize", "emoji-flux", "--method", "mixdq", "--prompts", "a.txt"),
        ("quantize", "emoji-flux", "--method", "qvgen", "--data", "a.txt"),
        ("rollout", "world", "--actions", "hold"),
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_a_place_that_takes_no_file_is_told_before_any_work(run, tmp_path, monkeypatch, command):
    """The administrator has all permissions in ``/proc``, which takes no file all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    monkeypatch.setattr("diffaccel.runs.loading.open_pipeline", None)
    done = run(*command, "--out", "/proc/x.mp4")
    assert done.status == 2 and "'/proc/x.mp4" in done.err and "cannot be written (" in done.err
    assert done.err.count("\n") == 1 and "Error" not in done.err


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert terminal.output_path("~/x") == tmp_path / "x"


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="no regular file"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1

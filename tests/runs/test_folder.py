"""The folder of a run: one writer, and nothing is deleted but what it wrote."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffaccel import folder_lock as lock
from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.images.open import open_source
from diffaccel.eval.sets.run import open_run
from diffaccel.files import write_tensor
from diffaccel.runs.folder import RunFailed, RunFolder
from diffaccel.runs.request import Request

PICTURE = Image.new("RGB", (4, 4))
COST = {"seconds": 1.0, "peak_memory": None}


def folder_of(path, num=3, prompt="a cat"):
    new = record.Record(kind=record.SAMPLE, settings={"prompts": [prompt], "num": num}, device={"type": "cpu"})
    return RunFolder(path, new, Request(prompts=(prompt,), num=num).chunks())


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_a_failed_run_deletes_what_it_wrote_and_nothing_else(tmp_path):
    path = tmp_path / "run"
    with folder_of(path) as folder:
        folder.check()
        folder.prepare()
        for theirs in ("00002.png", "12345.mp4", "00000.safetensors", ".mine.tmp", ".00009.png.mine.tmp"):
            (path / theirs).write_text("theirs")
        folder._write_image(folder.chunks[0][0], PICTURE, {})
        folder.abandon()
    assert names(path) == [".00009.png.mine.tmp", ".mine.tmp", "00000.safetensors", "00002.png", "12345.mp4"]


def test_a_failed_run_leaves_no_folder_that_it_made_and_one_that_it_found(tmp_path):
    for path in (tmp_path / "new", tmp_path / "old"):
        if path.name == "old":
            path.mkdir()
        with folder_of(path) as folder:
            folder.prepare()
            folder.abandon()
    assert names(tmp_path) == ["old"] and names(tmp_path / "old") == []


def test_preparing_removes_the_temporary_files_of_a_killed_run_only(tmp_path):
    (tmp_path / ".00001.png.0123abcd.tmp").write_text("left")
    (tmp_path / ".run.json.0123abcd.tmp").write_text("left")
    (tmp_path / ".notes.tmp").write_text("theirs")
    with folder_of(tmp_path) as folder:
        folder.prepare()
    assert names(tmp_path) == [".notes.tmp", "run.json"]


def test_overwriting_keeps_tensors_that_no_run_wrote(tmp_path):
    with folder_of(tmp_path, num=1) as folder:
        folder.prepare()
        folder.add(0, [PICTURE], {}, COST, latents=torch.zeros(1, 2))
        folder.close({})
    with folder_of(tmp_path, prompt="a dog") as other:
        other.check(overwrite=True)
    save_file({"weights": torch.zeros(2)}, tmp_path / "00000.safetensors")
    with folder_of(tmp_path, prompt="a dog") as other, pytest.raises(DiffAccelError, match=r"00000\.safetensors"):
        other.check(overwrite=True)
    write_tensor(tmp_path / "00000.safetensors", torch.zeros(2))
    with folder_of(tmp_path, prompt="a dog") as other:
        other.check(overwrite=True)
        (tmp_path / "00007.png").write_text("came after the check")
        other.prepare(overwrite=True)
    assert names(tmp_path) == ["00007.png", "run.json"]


def test_overwriting_throws_the_traces_of_searches_away(tmp_path):
    """Else the rewards of the old run would refuse the new one's search, or answer it."""
    traces = [tmp_path / "search" / f"0000{number}" for number in range(2)]
    for folder in traces:
        folder.mkdir(parents=True)
        for name in ("rewards.jsonl", "latents.safetensors", "trace.json", "reward.png", "000-0_84.2.png"):
            (folder / name).write_text("left")
    (traces[1] / "notes.txt").write_text("theirs")
    with folder_of(tmp_path) as folder:
        folder.prepare()
    assert len(list(traces[0].iterdir())) == 5
    with folder_of(tmp_path, prompt="a dog") as folder:
        folder.check(overwrite=True)
        folder.prepare(overwrite=True)
    assert not traces[0].exists() and names(traces[1]) == ["notes.txt"]


def test_a_folder_has_one_writer(tmp_path):
    with folder_of(tmp_path / "run") as first:
        with folder_of(tmp_path / "run") as late:  # neither found a folder
            first.prepare()
            with pytest.raises(DiffAccelError, match=rf"'.*run' is being written.*process {os.getpid()} on .*--out"):
                late.prepare()
        with pytest.raises(DiffAccelError, match="being written"), folder_of(tmp_path / "run"):
            pass
        first.add(0, [PICTURE], {}, COST)
    with folder_of(tmp_path / "run") as second:
        second.prepare()
        assert list(second.finished()) == [0]
    assert names(tmp_path / "run") == [".chunks", "00000.png", "run.json"]


def test_a_run_that_comes_first_is_found_when_the_folder_is_prepared(tmp_path):
    with folder_of(tmp_path / "run") as late:
        with folder_of(tmp_path / "run", prompt="a dog") as first:
            first.prepare()
        with pytest.raises(DiffAccelError, match="holds another run"):
            late.prepare()


HOLDER = """
import sys, time
from pathlib import Path
from diffaccel.folder_lock import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_the_place_of_an_image_is_named(tmp_path):
    """Before the run is drawn; and while it is written, where it came in between."""
    first = folder_of(tmp_path / "run")
    first.prepare()
    (tmp_path / "run" / "00001.png").mkdir()
    with pytest.raises(
        DiffAccelError, match=r"a folder named 00001\.png, where an image of this run.*Move it; the same"
    ):
        folder_of(tmp_path / "run").check()
    with pytest.raises(RunFailed, match=r"Is a directory\)\. Move the folder named 00001\.png, which is in the place"):
        first.add(1, [PICTURE], {}, COST)
    (tmp_path / "run" / "00001.png").rmdir()
    (tmp_path / "run" / "00009.png").mkdir()  # of no image of this run
    folder_of(tmp_path / "run").check()
    first.add(1, [PICTURE], {}, COST)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Make room;"), (errno.EROFS, "Make it writable;"), (errno.EIO, "Mend that;")],
)
def test_what_to_do_about_a_failed_write_depends_on_what_failed(tmp_path, monkeypatch, number, advice):
    def fails(*_):
        raise OSError(number, os.strerror(number), "x.png")

    monkeypatch.setattr("diffaccel.runs.folder.write_png", fails)
    first = folder_of(tmp_path)
    first.prepare()
    with pytest.raises(
        RunFailed, match=rf"cannot be written \({os.strerror(number)}\)\. {advice} finished images stay"
    ):
        first.add(0, [PICTURE], {}, COST)


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on Windows")
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    mine = lock.FolderLock(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DiffAccelError, match=f"process {holder.pid}"):
            mine.acquire()
        holder.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [lock.NAME]
    mine.acquire()
    assert mine.held
    mine.release()
    assert names(tmp_path) == []


def drawn(path):
    """A finished run of three pictures."""
    with folder_of(path) as folder:
        folder.prepare()
        for number in range(3):
            folder.add(number, [PICTURE], {}, COST)
        folder.close({})
    return json.loads((path / record.RUN).read_text())


@pytest.mark.parametrize(
    ("keys", "value", "part"),
    [
        (("state",), None, "state"),
        (("started",), 7, "started"),
        (("settings", "prompts"), "text", r"settings\.prompts"),
        (("images",), {}, "images"),
        (("images", 1), [], r"images\[1\]"),
        (("images", 1, "file"), None, r"images\[1\]\.file"),
        (("images", 1, "file"), "../../x.png", r"images\[1\]\.file"),
        (("images", 0, "id"), -1, r"images\[0\]\.id"),
        (("images", 0, "id"), True, r"images\[0\]\.id"),
        (("cost",), [], "cost"),
        (("cost", "seconds"), float("nan"), r"cost\.seconds"),
        (("cost", "parts"), {"network": None}, r"cost\.parts\.network"),
        (("chunks", 2, "chunk"), "2", r"chunks\[2\]\.chunk"),
        (("until",), "ssim", "until"),
        (("call",), {"num_inference_steps": "4"}, r"call\.num_inference_steps"),
    ],
)
def test_a_damaged_record_is_one_sentence_that_names_the_part(tmp_path, keys, value, part):
    values = inner = drawn(tmp_path)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / record.RUN).write_text(json.dumps(values))
    for use in (
        folder_of(tmp_path).check,
        folder_of(tmp_path).finished,
        lambda: open_run(tmp_path),
        lambda: open_source(tmp_path),
    ):
        with pytest.raises(DiffAccelError, match=rf"run\.json' is a damaged record: {part} is missing or no such"):
            use()


def test_chunks_that_a_record_has_too_many_are_left_out(tmp_path):
    values = drawn(tmp_path)
    values["chunks"].append({"chunk": 99, "cost": COST})
    (tmp_path / record.RUN).write_text(json.dumps(values))
    assert list(folder_of(tmp_path).finished()) == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"fingerprint": 1}', "\0" * 40])
@pytest.mark.parametrize("keys", [None, ("chunk",), ("cost",), ("images",), ("images", 0), ("images", 0, "sha256")])
def test_a_chunk_with_a_damaged_marker_is_not_finished(tmp_path, text, keys):
    with folder_of(tmp_path) as folder:
        folder.prepare()
        folder.add(0, [PICTURE], {}, COST)
        folder.add(1, [PICTURE], {}, COST)
        marker = tmp_path / ".chunks" / "00001.json"
        if keys is not None:
            values = inner = json.loads(marker.read_text())
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = text
            text = json.dumps(values)
        marker.write_text(text)
        assert list(folder.finished()) == [0]

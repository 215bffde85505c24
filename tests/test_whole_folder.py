"""A saved model's folder is whole, or what was there before; and no run removes what another one writes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from diffaccel.cli import distill, planned
from diffaccel.errors import DiffAccelError
from diffaccel.folder_lock import FolderLock
from diffaccel.whole_folder import PARTIAL, check_free, whole_folder


def save(folder: Path, text: str = "new") -> None:
    for name in ("vae/config.json", "vae/weights", "model_index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    with whole_folder(tmp_path / "expected") as folder:
        save(folder)
        assert contents(tmp_path / "expected").keys() - contents(folder).keys()
        assert not (tmp_path / "expected" / "model_index.json").exists()
    return contents(tmp_path / "expected")


@pytest.mark.parametrize("moved", [(), ("vae",)], ids=["before any part is in place", "between two parts"])
def test_a_killed_save_is_repeated(moved: tuple[str, ...], expected: dict[str, str], tmp_path: Path) -> None:
    """A kill leaves the parts that were in place, the rest, and the lock's file; the index comes last."""
    out = tmp_path / "out"
    save_to = out / PARTIAL
    save_to.mkdir(parents=True)
    save(save_to, "old")
    (out / ".lock").write_text("process 1 on another host")
    for name in moved:
        (save_to / name).rename(out / name)
    check_free(out, overwrite=False)
    with whole_folder(out) as folder:
        save(folder)
    assert contents(out) == expected


def test_a_kill_before_anything_was_written_leaves_a_free_folder(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    check_free(tmp_path, overwrite=False)
    planned.check_out(tmp_path, overwrite=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_is_there_stays_until_the_new_model_is_whole(error: BaseException, tmp_path: Path) -> None:
    save(tmp_path, "old")
    before = contents(tmp_path)
    wanted: Any = DiffAccelError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="No space left on device" if isinstance(error, OSError) else None):
        with whole_folder(tmp_path, overwrite=True) as folder:
            (folder / "vae").mkdir()
            raise error
    assert contents(tmp_path) == before and not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize("name", ("save", "plan", "distill"))
def test_a_full_disk_that_safetensors_tells_of_is_one_sentence(name: str, tmp_path: Path) -> None:
    words = r"cannot be written \(No space left on device\)"
    with pytest.raises(DiffAccelError, match=words), ALONE[name](tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="header too small"), ALONE[name](tmp_path / "out"):
        raise SafetensorError("Error while deserializing header: header too small")


def test_what_is_not_of_a_save_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DiffAccelError, match=r"is not empty\. Give another --out"), whole_folder(tmp_path):
        pytest.fail("written")
    assert (tmp_path / "mine.txt").exists()


ALONE: dict[str, Callable[[Path], Any]] = {
    "save": lambda out: whole_folder(out, overwrite=True),
    "plan": planned.alone,
    "distill": lambda out: distill.alone(out, 0),
}


@pytest.mark.parametrize("name", ALONE)
def test_nothing_of_a_run_that_is_going_on_is_removed(name: str, tmp_path: Path) -> None:
    for written in ("checkpoint.safetensors", "model_index.json", ".checkpoint.safetensors.0123abcd.tmp"):
        (tmp_path / written).write_text("of the other run")
    other = FolderLock(tmp_path)
    other.acquire()
    before = contents(tmp_path)
    with pytest.raises(DiffAccelError, match="is being written by another run"), ALONE[name](tmp_path):
        pytest.fail("two runs in one folder")
    assert contents(tmp_path) == before
    other.release()
    with ALONE[name](tmp_path):
        pass

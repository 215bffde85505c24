"""Names of images: numbers count as numbers, links are followed, nothing that looks like a picture is lost."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffaccel.errors import DiffAccelError
from diffaccel.eval.images import names
from diffaccel.eval.images.open import open_source
from diffaccel.eval.sets.run import open_run


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


def test_numbers_in_names_count_as_numbers():
    ordered = ["0", "1", "2", "007", "10", "a", "a2", "a10", "a10-2", "a10-11", "b/2", "b/10", "b2/1", "b10/1", "²"]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert [shuffled[i] for i in names.order(shuffled, None, "x")] == ordered
    padded = [f"{i:05d}" for i in random.Random(1).sample(range(20000), 500)]
    assert [padded[i] for i in names.order(padded, None, "x")] == sorted(padded)  # as diffaccel names pictures
    with pytest.raises(DiffAccelError, match="Two images of x have the id '7'"):
        names.order(["7", "1", "7"], None, "x")


@pytest.mark.parametrize(
    ("ids", "consecutive"),
    [
        (["0", "1", "2"], True), (["img_1.5", "img_2.5"], True), (["00009", "00010"], False), (["a"], True),
        (["1", "2", "4"], False), (["cat", "dog"], False), (["1a", "2b"], False), (["a/0", "b/1"], False),
    ],
)  # fmt: skip
def test_consecutive_numbers(ids, consecutive):
    assert names.are_consecutive(ids) is consecutive


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_come_in_the_order_of_their_numbers(tmp_path, kind):
    for i in range(12):
        save(tmp_path / "set" / f"{i}.png", i)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for file in (tmp_path / "set").iterdir():
                archive.write(file, file.name)
    source = open_source(tmp_path / {"folder": "set", "zip": "set.zip"}[kind])
    assert [int(source.image(i).max()) for i in range(12)] == list(range(12)) and source.warnings == []
    assert open_source(tmp_path / "set", num=3).ids == ("0", "1", "2")


def test_links_are_followed_once(tmp_path):
    save(tmp_path / "set" / "a.PNG")
    save(tmp_path / "set" / "deep" / "b.jpeg")
    save(tmp_path / "elsewhere" / "1.png", 7)
    save(tmp_path / "elsewhere" / "more" / "2.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "c.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert open_source(tmp_path / "set").ids == ("a", "c", "deep/b", "linked/1", "linked/more/2")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "set")  # a loop
    (tmp_path / "set" / "again").symlink_to(tmp_path / "elsewhere" / "more")  # the same pictures by another name
    (tmp_path / "set" / "lost.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(tmp_path / "set")
    assert len(source) == 5 and int(source.image(source.ids.index("c")).max()) == 7
    texts = " ".join(source.warnings)
    assert "1 links in" in texts and "'lost.png'" in texts and "2 links in" in texts and "are there already" in texts


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_looks_like_a_picture_and_is_left_out_is_counted(tmp_path, kind):
    folder = tmp_path / "set"
    save(folder / "a.png")
    save(folder / ".hidden" / "b.png")
    save(folder / ".c.PNG")
    (folder / "._a.png").write_bytes(b"macOS")
    (folder / "bare").write_bytes((folder / "a.png").read_bytes())
    for name in ("d.heic", "e.AVIF", "f.avif", "g.mp4", "notes.txt", "LICENSE"):
        (folder / name).write_bytes(b"whatever")
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for file in folder.rglob("*"):
                archive.write(file, file.relative_to(folder))
    source = open_source(tmp_path / {"folder": "set", "zip": "set.zip"}[kind])
    assert source.ids == ("a",)
    (warning,) = source.warnings
    assert warning.endswith("are left out: 2 .avif, 1 .heic, 1 .mp4, 1 without a suffix, 2 hidden.")


def test_a_folder_of_videos_says_that_its_pictures_are_left_out(tmp_path):
    for name in ("10.mp4", "deep/2.MP4", "9.mp4", ".x.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    run = open_run(tmp_path)
    assert [picture.id for picture in run.pictures] == ["9", "10", "deep/2"] and run.is_video and run.warnings == []
    save(tmp_path / "a.png")
    assert open_run(tmp_path).warnings == [f"'{tmp_path}' holds 3 videos, and its 1 pictures are left out."]


def test_an_encrypted_zip_is_one_sentence(tmp_path):
    save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    data = bytearray((tmp_path / "set.zip").read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + place] |= 1  # the flag of encryption
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(DiffAccelError, match=r"1 of 1 files in '.*' are encrypted, the first 'a\.png'"):
        open_source(tmp_path / "set.zip")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text_is_one_sentence(tmp_path):
    save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(DiffAccelError, match=r"The name '\\udcff' in '.*' is no text in UTF-8\. Rename that file\."):
        open_source(tmp_path)


def test_a_run_keeps_what_its_folder_warned_of(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"")
    run = open_run(tmp_path)
    assert len(run.warnings) == 1 and "1 .heic" in run.warnings[0]
    assert torch.equal(run.image(0), torch.zeros(3, 4, 4, dtype=torch.uint8))

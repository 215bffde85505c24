"""Records and files: what is written is whole, reads back, and names what differs."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.files import atomic, folder_digest, pixels_sha256, read_png, write_json, write_png


def test_a_record_reads_back(tmp_path):
    running = record.Record(kind="sample", settings={"steps": 4, "scale": 0.1}, command=["diffaccel"])
    running.save(tmp_path / "a.json")
    stored = record.read(tmp_path / "a.json", "sample")
    assert stored["state"] == "running" and stored["fingerprint"] == running.fingerprint
    running.finish(images=[1, 2]).save(tmp_path / "a.json")
    stored = record.read(tmp_path / "a.json", "sample")
    assert stored["state"] == "finished" and stored["images"] == [1, 2] and stored["finished"] >= stored["started"]
    assert {"python", "torch", "diffaccel"} <= stored["versions"].keys()


def test_fingerprint_is_of_the_settings_alone():
    original, same = (record.Record(kind="sample", settings=s) for s in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    same.command = ["other"]
    assert original.fingerprint == same.fingerprint
    assert original.fingerprint != record.Record(kind="sample", settings={"a": 1, "b": 3}).fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no record of diffaccel"),
        ("[]", "is no record of 'sample'"),
        ('{"kind": "eval", "settings": {}}', "is no record of 'sample'"),
        ('{"kind": "sample", "settings": {}, "format": 7}', "record format 7"),
    ],
)
def test_other_files_are_no_records(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DiffAccelError, match=message):
        record.read(tmp_path / "a.json", "sample")


def test_no_file_is_no_record(tmp_path):
    assert record.read(tmp_path / "a.json", "sample") is None


def test_differences_name_keys_old_and_new():
    old = {"steps": 4, "model": {"name": "a"}, "same": 1, "gone": None}
    new = {"steps": 5, "model": {"name": "b"}, "same": 1, "prompts": ["x" * 99]}
    assert record.differences(old, new) == [
        'model.name: "a" -> "b"', f'prompts: null -> ["{"x" * 55}...', "steps: 4 -> 5",
    ]  # fmt: skip
    assert record.differences(old, old) == []


def test_differences_of_long_values_that_begin_alike_say_where():
    def settings(budget: int, last: str) -> dict:
        method = {"name": "rbf", "state": "float32", "max_batch": 0, "guidance_stop": 1.0, "budget": budget}
        return {"methods": [method], "prompts": [*(f"a long prompt, number {i}" for i in range(9)), last]}

    assert record.differences(settings(12, "z"), settings(14, "z")) == ["methods[0].budget: 12 -> 14"]
    assert record.differences(settings(1, "z"), settings(1, "y")) == ['prompts[9]: "z" -> "y"']
    old, new = ({"prompts": [f"a long prompt, number {i}" for i in range(n)]} for n in (9, 10))
    assert record.differences(old, new) == ["prompts: 9 values -> 10 values"]
    old, new = ({"prompts": [f"a long prompt, number {i + j * (i > 5)}" for i in range(9)]} for j in (0, 1))
    assert record.differences(old, new) == [
        'prompts[6]: "a long prompt, number 6" -> "a long prompt, number 7"', "2 more of prompts",
    ]  # fmt: skip
    assert record.differences({"negative": "x" * 99 + "a"}, {"negative": "x" * 99 + "b"}) == [
        'negative, from letter 89: "xxxxxxxxxxa" -> "xxxxxxxxxxb"'
    ]


def test_a_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "a"
    with atomic(file) as out:
        out.write(b"old")
    with pytest.raises(KeyboardInterrupt), atomic(file) as out:
        out.write(b"new, half-wri")
        assert file.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_json_without_infinities(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", {"x": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_png_carries_text_and_loses_nothing(tmp_path):
    image = Image.effect_noise((9, 5), 64).convert("RGB")
    write_png(tmp_path / "a.png", image, {"prompt": "größe 🍎", "seed": 3})
    assert read_png(tmp_path / "a.png") == {"prompt": "größe 🍎", "seed": 3}
    again = Image.open(tmp_path / "a.png")
    assert again.tobytes() == image.tobytes()
    assert pixels_sha256(again) == pixels_sha256(image) != pixels_sha256(image.rotate(180))
    image.save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no picture")
    assert read_png(tmp_path / "b.png") is read_png(tmp_path / "c.png") is None


def test_folder_digest_sees_names_and_content_of_small_and_large_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text(json.dumps({"a": 1}))
    large = bytearray(20 << 20)
    (tmp_path / "weights").write_bytes(large)
    seen = {folder_digest(tmp_path)}
    (tmp_path / ".cache").write_text("not part of the model")
    assert {folder_digest(tmp_path)} == seen
    for position in (0, len(large) - 1):
        large[position] = 1
        (tmp_path / "weights").write_bytes(large)
        seen.add(folder_digest(tmp_path))
    (tmp_path / "sub" / "config.json").write_text(json.dumps({"a": 2}))
    seen.add(folder_digest(tmp_path))
    (tmp_path / "weights").rename(tmp_path / "other")
    seen.add(folder_digest(tmp_path))
    assert len(seen) == 5

"""Materialising: once, atomically, by several processes at once, and again after damage."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from started import in_processes

import diffaccel.zoo
from diffaccel.errors import DiffAccelError
from diffaccel.zoo import packing, store


@pytest.fixture
def packed(tmp_path):
    plain = tmp_path / "plain"
    (plain / "part").mkdir(parents=True)
    torch.manual_seed(0)
    weights = {"weight": torch.randn(256, 256).bfloat16(), "bias": torch.randn(256).bfloat16()}
    save_file(weights, plain / "part" / "model.safetensors", metadata={"format": "pt"})
    (plain / "part" / "config.json").write_text('{"a": 1}')
    return packing.pack(plain, tmp_path / "zoo" / "tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "zoo"


def test_made_once_then_found(packed, cache):
    folder = store.materialise(packed, "tiny")
    assert folder.parent == cache and folder.name.startswith("tiny-")
    made = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert store.materialise(packed, "tiny", verify=True) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == made
    assert os.listdir(cache) == [folder.name]


@pytest.mark.parametrize("damage", ["truncate", "remove", "record"])
def test_damage_is_repaired(packed, damage):
    folder = store.materialise(packed, "tiny")
    weights = folder / "part" / "model.safetensors"
    good = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(good[:100])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / store.RECORD).write_text("{")
    assert store.materialise(packed, "tiny") == folder
    assert weights.read_bytes() == good


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("way", ["in place", "replaced"])
def test_altered_bytes_are_found(packed, way, verify):
    folder = store.materialise(packed, "tiny")
    weights = folder / "part" / "model.safetensors"
    good = weights.read_bytes()
    altered = weights if way == "in place" else folder / "copy"
    altered.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.replace(altered, weights)
    store.materialise(packed, "tiny", verify=verify)
    assert weights.read_bytes() == good


def test_decay_that_leaves_no_trace_is_found_when_asked(packed):
    folder = store.materialise(packed, "tiny")
    weights = folder / "part" / "model.safetensors"
    good, status = weights.read_bytes(), weights.stat()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    store.materialise(packed, "tiny")
    assert weights.read_bytes() != good  # same inode, time and size
    store.materialise(packed, "tiny", verify=True)
    assert weights.read_bytes() == good


def test_files_are_read_again_only_when_they_may_have_changed(packed, monkeypatch):
    folder = store.materialise(packed, "tiny")
    verified = []
    verify = packing.verify

    def watch(folder, expected, *texts):
        verified.append(sorted(expected))
        verify(folder, expected, *texts)

    monkeypatch.setattr(packing, "verify", watch)
    store.materialise(packed, "tiny")
    weights = folder / "part" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    for _ in range(2):
        store.materialise(packed, "tiny")
    store.materialise(packed, "tiny", verify=True)
    assert verified == [[], ["part/model.safetensors"], [], ["part/config.json", "part/model.safetensors"]]


def test_a_folder_of_an_older_version_is_read_once(packed):
    folder = store.materialise(packed, "tiny")
    values = json.loads((folder / store.RECORD).read_text())
    states = values.pop("read")
    (folder / store.RECORD).write_text(json.dumps(values))
    store.materialise(packed, "tiny")
    assert json.loads((folder / store.RECORD).read_text())["read"] == states


def test_files_are_on_the_disk_before_the_folder_has_its_name(packed, monkeypatch):
    flushed, rename = [], os.rename
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))

    def publish(source, target):
        assert {path.stat().st_ino for path in source.rglob("*")} <= set(flushed)
        rename(source, target)

    monkeypatch.setattr(os, "rename", publish)
    assert store.materialise(packed, "tiny").is_dir()


def test_another_packed_model_gets_another_folder(packed, tmp_path):
    first = store.materialise(packed, "tiny")
    plain = tmp_path / "plain"
    save_file({"weight": torch.zeros(4, 4)}, plain / "part" / "model.safetensors")
    packing.pack(plain, packed)
    second = store.materialise(packed, "tiny")
    assert second != first and first.is_dir()
    assert torch.equal(load_file(second / "part" / "model.safetensors")["weight"], torch.zeros(4, 4))


def test_a_damaged_packed_file_is_an_error_and_leaves_nothing(packed, cache):
    shard = next(packed.glob("weights-*"))
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DiffAccelError, match=rf"{shard.name}.*expected.*reinstall diffaccel"):
        store.materialise(packed, "tiny")
    assert os.listdir(cache) == []


def test_old_leftovers_are_swept_and_fresh_ones_kept(packed, cache):
    old, fresh = cache / ".tiny-0.a.tmp", cache / ".tiny-0.b.tmp"
    old.mkdir(parents=True)
    fresh.mkdir()
    long_ago = time.time() - 10 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    store.materialise(packed, "tiny")
    assert not old.exists() and fresh.exists()


def test_a_cache_that_cannot_be_written_says_what_to_set(packed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(DiffAccelError, match="DIFFACCEL_CACHE"):
        store.materialise(packed, "tiny")


def test_without_the_variable_the_users_cache_folder_is_used(monkeypatch):
    monkeypatch.delenv(store.CACHE_VARIABLE)
    assert store.cache_dir().name == "zoo" and "diffaccel" in str(store.cache_dir())


def _materialise(rank: int, packed: Path, told: str) -> None:
    Path(told, str(rank)).write_text(str(store.materialise(packed, "tiny", verify=True)))


@pytest.mark.slow
def test_several_processes_at_once_agree(packed, cache, tmp_path_factory):
    damaged = store.materialise(packed, "tiny")
    (damaged / "part" / "config.json").unlink()  # all of them find a folder that must be replaced
    told = tmp_path_factory.mktemp("told")
    in_processes(_materialise, (packed, str(told)), 4)
    assert [(told / str(rank)).read_text() for rank in range(4)] == [str(damaged)] * 4
    assert os.listdir(cache) == [damaged.name]
    record = json.loads((damaged / store.RECORD).read_text())["files"]
    packing.verify(damaged, record, "file", "fix")


def test_names_card_and_unknown_names(packed, monkeypatch):
    monkeypatch.setattr(diffaccel.zoo, "_ROOT", packed.parent)
    assert diffaccel.zoo.names() == ["tiny"]
    assert (diffaccel.zoo.path("tiny") / "part" / "config.json").is_file()
    with pytest.raises(DiffAccelError, match=r"Did you mean 'tiny'\?"):
        diffaccel.zoo.path("tinny")
    with pytest.raises(DiffAccelError, match="card"):
        diffaccel.zoo.card("tiny")
    (packed / diffaccel.zoo.CARD).write_text('{"licence": "Apache-2.0"}')
    assert diffaccel.zoo.card("tiny") == {"licence": "Apache-2.0"}


def test_importing_the_zoo_does_not_import_torch():
    code = "import sys, diffaccel.zoo as z; z.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

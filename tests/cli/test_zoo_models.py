"""Embedded models by name: the default one, its card's defaults, and a damaged cache, with a tiny packed pipeline."""

from __future__ import annotations

import json

import pytest

from diffaccel import zoo
from diffaccel.zoo import packing

DEFAULTS = {"height": 32, "width": 48, "num_inference_steps": 3, "true_cfg_scale": 2.0, "negative_prompt": "",
            "max_sequence_length": 24}  # fmt: skip


@pytest.fixture
def embedded(models, tmp_path, monkeypatch):
    """A zoo that holds the tiny FLUX under the default model's name, and a model that is no pipeline."""
    root = tmp_path / "zoo"
    packing.pack(models / "flux", root / zoo.DEFAULT)
    (root / zoo.DEFAULT / zoo.CARD).write_text(json.dumps({"title": "tiny", "state": "test", "defaults": DEFAULTS}))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    packing.pack(tmp_path / "clip", root / "emoji-clip-judge")
    (root / "emoji-clip-judge" / zoo.CARD).write_text("{}")
    monkeypatch.setattr(zoo, "_ROOT", root)
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_default_model_and_its_defaults(run, embedded):
    record = run("sample", "two cats", "--out", "a", "--json").json
    assert record["settings"]["model"] == zoo.DEFAULT and len(record["settings"]["model_digest"]) == 12
    assert record["call"] == DEFAULTS and record["cost"]["nfe"] == 3 and record["cost"]["forwards"] == 6
    shorter = run("sample", "two cats", "--out", "b", "--json", "--steps", 2, "--guidance", 1, "--size", 32).json
    assert shorter["cost"]["forwards"] == 2 and shorter["call"]["max_sequence_length"] == 24


@pytest.mark.slow
def test_damaged_caches_are_made_again(run, embedded, monkeypatch):
    first = run("sample", "two cats", "--out", "a", "--json").json
    weights = zoo.path() / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-10], b"\xff" * 64 + whole[64:]):  # shorter, or of the same size
        weights.write_bytes(damaged)
        again = run("sample", "two cats", "--out", "a", "--overwrite", "--json")
        assert again.status == 0 and again.json["images"] == first["images"]
        assert weights.read_bytes() == whole


def test_models_by_wrong_names(run, embedded):
    assert "Did you mean 'emoji-flux'" in run("sample", "two cats", "--model", "emoji-fluks").err
    done = run("sample", "two cats", "--model", "emoji-clip-judge")
    assert done.status == 2 and "is no pipeline. Use one that makes images: emoji-flux" in done.err

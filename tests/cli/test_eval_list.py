"""``diffaccel eval list``: what is here, what is not, and where it was looked for."""

from __future__ import annotations

import pytest
import torch

from diffaccel.eval.networks import extractors, protocols, scorers, weights
from tests.support import random_inception


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "weights"


def listed(run) -> dict[tuple[str, str], dict]:
    done = run("eval", "list", "--json")
    assert done.status == 0 and not done.err
    return {(entry["kind"], entry["name"]): entry for entry in done.json["entries"]}


def test_everything_that_a_command_takes_is_listed(run):
    found = listed(run)
    for kind, names in (
        ("protocol", protocols.PROTOCOLS), ("scorer", scorers.KNOWN), ("extractor", ["tiny", *extractors.clips()]),
        ("metric", protocols.COMMANDS),
    ):  # fmt: skip
        assert {name for one, name in found if one == kind} >= set(names)
    here = {name for (kind, name), entry in found.items() if kind == "extractor" and entry["available"]}
    assert {"tiny", "emoji-clip-judge", "emoji-clip-reward"} <= here and not {"inception", "dinov2"} & here
    for entry in found.values():  # a reason exactly where something lacks
        assert entry["available"] == (entry["why"] == "")


def test_what_lacks_names_its_files_and_places(run, places):
    found = listed(run)
    lacking = found["protocol", "tf-fid"]
    assert lacking["why"] == "weights not found" and lacking["needs"] == "extractor inception"
    assert str(places / weights.KNOWN["inception"].files[0]) in lacking["looked"]
    assert any("vit_large_patch14_clip_336" in place for place in found["protocol", "cmmd"]["looked"])
    assert found["scorer", "hpsv2"]["why"].startswith("HPS_v2.1_compressed.pt not found")
    text = run("eval", "list").out
    assert f"  {places / 'alexnet-owt-7be5be79.pth'}\n" in text and "no   tf-fid" in text and "yes  tiny" in text


@pytest.mark.slow
def test_weights_that_appear_are_found_and_their_digest_looked_at(run, places, monkeypatch):
    known = weights.KNOWN["inception"]
    file = random_inception.save(places / known.files[0])
    wrong = listed(run)["extractor", "inception"]
    assert not wrong["available"] and "--allow-unknown-weights" in wrong["why"] and wrong["where"] == str(file)
    from diffaccel.files import sha256

    verified = weights.WeightFile(files=known.files, url="", sha256=sha256(file)[:8])
    monkeypatch.setitem(weights.KNOWN, "inception", verified)
    found = listed(run)
    for name in ("tf-fid", "pytorch-fid", "clean-fid", "adm", "edm"):
        assert found["protocol", name]["available"] and found["protocol", name]["where"] == str(file)
    assert found["metric", "is"]["available"] and not found["protocol", "dgm-dinov2"]["available"]


def test_json_in_a_file(run, tmp_path):
    done = run("eval", "list", "--json", tmp_path / "list.json")
    assert "Protocols" in done.out and (tmp_path / "list.json").is_file()

"""``diffaccel eval fid``, ``kid``, ``prdc``, ``stats``: two sets, or statistics in place of one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(12):
            pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(root / name / f"{i:02d}.png")
    return root


def test_distances(run, sets):
    same, apart = (run("eval", "fid", sets / "a", sets / other, "--json") for other in ("a", "b"))
    (key,) = apart.json["values"]
    assert key.startswith("FD-tiny@") and apart.json["n"] == apart.json["m"] == 12
    assert same.json["values"][key] == pytest.approx(0, abs=1e-9) and apart.json["values"][key] > 1e-3
    assert "singular" in apart.json["warnings"][0]
    shares = run("eval", "prdc", sets / "a", sets / "a", "--json").json["values"]
    assert [value for name, value in shares.items() if name.startswith(("precision", "recall"))] == [1, 1]
    text = run("eval", "kid", sets / "a", sets / "b")
    assert text.status == 0 and text.out.startswith("KID-tiny@") and "x1000" in text.out and "FID" not in text.out


def test_statistics_stand_for_a_set(run, sets, tmp_path):
    assert run("eval", "stats", sets / "b", "-o", tmp_path / "b.npz").status == 0
    direct, stored = (
        run("eval", "fid", sets / "a", other, "--json").json for other in (sets / "b", tmp_path / "b.npz")
    )
    (key,) = direct["values"]
    assert stored["values"][key] == pytest.approx(direct["values"][key], rel=1e-6) and stored["m"] == 12
    with np.load(tmp_path / "b.npz") as file:
        assert file["mu"].shape == (192,) and file["sigma"].shape == (192, 192)
    both = run("eval", "fid", tmp_path / "b.npz", tmp_path / "b.npz", "--json")
    assert both.json["values"][key] == pytest.approx(0, abs=1e-9)


def test_num(run, sets):
    assert run("eval", "fid", sets / "a", sets / "b", "--num", 5, "--json").json["n"] == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fid", "a", "none"], "There is no"),
        (["fid", "a", "b", "--num", 99], "99 images were asked for"),
        (["fid", "a", "b", "--extractor", "tny"], "tiny"),
        (["prdc", "a", "foreign.npz"], "not statistics"),
        (["fid", "a", "other.npz"], "another network"),
        (["fid", "a", "foreign.npz"], "192"),
    ],
)
def test_bad_input(run, sets, words, said):
    np.savez(
        sets / "foreign.npz",
        mu=np.zeros(4 if words[0] == "fid" else 192),
        sigma=np.eye(4 if words[0] == "fid" else 192),
    )
    known = {"weights_sha256": "0" * 64, "feature_name": "net", "protocol": "own", "n": 9, "version": 1}
    np.savez(sets / "other.npz", mu=np.zeros(192), sigma=np.eye(192), **known)
    done = run(
        "eval", *[sets / word if str(word) in ("a", "b", "none") or ".npz" in str(word) else word for word in words]
    )
    assert done.status in (2, 3) and said in done.err and not done.out

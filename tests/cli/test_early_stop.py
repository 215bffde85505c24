"""``eval run --until``: when a run ends, what its record says, and what it is compared with."""

from __future__ import annotations

import json

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import paired
from diffaccel.eval.sets.run import open_run
from diffaccel.eval.timing import early_stop

COUNT = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory, models):
    from diffaccel.cli import main

    folder = tmp_path_factory.mktemp("early")
    (folder / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(COUNT)))
    words = ["eval", "run", "--prompts", folder / "p.txt", "--model", models / "flux", "--threads", 1, "--batch", 4]
    words += ["--accel", "plain:steps=3,size=32", "--out", folder / "base", "--json"]
    assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture
def draw(run, root, models, tmp_path):
    def call(name, accel, *more, batch=4):
        words = ["--prompts", root / "p.txt", "--model", models / "flux", "--threads", 1, "--batch", batch, "--json"]
        return run("eval", "run", *words, "--accel", accel, "--out", tmp_path / name, *more)

    return call


def until(root, rule, looks="16,24"):
    return "--baseline", root / "base", "--until", rule, "--looks", looks


def pixels(folder):
    return [image["pixels_sha256"] for image in json.loads((folder / "run.json").read_text())["images"]]


@pytest.mark.slow
def test_equivalence_ends_a_run(draw, root, run, tmp_path):
    rule = "ssim within 0.5"
    made = draw("close", "dpmpp2m:steps=3,size=32", *until(root, rule)).json
    assert made["state"] == "finished" and len(made["images"]) == 16 and made["until"]["verdict"] == "equivalent"
    assert made["until"]["sentence"] == "equivalence proven after 16 prompts"
    base, close = open_run(root / "base"), open_run(tmp_path / "close")
    pairs = [torch.stack([one.image(i) for i in range(16)]) for one in (base, close)]
    measured = made["until"]["metrics"]["ssim"]
    assert measured["difference"] == pytest.approx(float(paired.ssim(*pairs).mean()) - 1, abs=1e-9)
    assert -0.5 < measured["low"] <= measured["difference"] <= measured["high"] < 0.5

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "close").glob("*.png")}
    again = draw("close", "dpmpp2m:steps=3,size=32", *until(root, rule)).json
    assert again["until"] == made["until"] and again["finished"] == made["finished"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "close").glob("*.png")} == files

    done = run("eval", "compare", root / "base", tmp_path / "close", "--json").json
    row = next(row for row in done["metrics"] if (row["metric"], row["run"]) == ("ssim", "close"))
    assert row["n"] == 16 and row["value"] == pytest.approx(1 + measured["difference"], abs=1e-9)
    assert any("first 16 of 40" in warning and "equivalence proven" in warning for warning in done["warnings"])
    nfe = next(row for row in done["metrics"] if (row["metric"], row["run"]) == ("nfe", "base"))
    assert nfe["value"] == pytest.approx(3)  # of a picture, whatever share of the run is looked at


@pytest.mark.slow
def test_a_proven_difference_ends_it_too(draw, root):
    made = draw("far", "plain:steps=1,size=32", *until(root, "ssim within 0.0001 and latent_error within 1.9"))
    assert made.status == 2 and "--latents" in made.err
    made = draw("far", "ancestral:steps=3,size=32", *until(root, "ssim within 0.0001")).json
    assert made["until"]["verdict"] == "different" and len(made["images"]) == 16
    assert made["until"]["sentence"] == "difference in ssim proven after 16 prompts"


@pytest.mark.slow
def test_without_a_proof_all_pictures_are_drawn(draw, root):
    """Forty equal pictures leave room for ruined ones of a share above the tolerance."""
    made = draw("same", "euler:steps=3,size=32", *until(root, "ssim within 0.1")).json
    assert len(made["images"]) == COUNT and made["until"]["verdict"] == "go on"
    gain = (20 ** (1 / COUNT) - 1) / 0.75  # every bet was three quarters of the capital
    assert made["until"]["metrics"]["ssim"]["low"] == pytest.approx(2 / (1 + gain) - 2, rel=1e-6)
    assert made["until"]["metrics"]["ssim"]["high"] == pytest.approx(0, abs=1e-6)
    again = draw("same", "euler:steps=3,size=32", *until(root, "ssim within 0.1")).json
    assert again["finished"] == made["finished"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_without_the_rule(draw, root, tmp_path):
    accel = "dpmpp2m:steps=3,size=32"
    draw("whole", accel)
    draw("part", accel, *until(root, "ssim within 0.5"))
    draw("part", accel)
    assert pixels(tmp_path / "part") == pixels(tmp_path / "whole") and len(pixels(tmp_path / "part")) == COUNT
    looked = draw("part", accel, *until(root, "ssim within 0.6")).json  # another rule, answered by what is there
    assert looked["until"]["images"] == 16 and len(looked["images"]) == COUNT


@pytest.mark.slow
def test_looks_fall_on_whole_chunks(draw, root):
    made = draw("odd", "dpmpp2m:steps=3,size=32", *until(root, "ssim within 0.5", "17"), batch=8).json
    assert len(made["images"]) == 24 and "looks at 24, 40" in made["until"]["rule"]


@pytest.mark.slow
def test_a_damaged_picture_is_made_again(draw, root, tmp_path):
    accel, rule = "dpmpp2m:steps=3,size=32", until(root, "ssim within 0.5")
    draw("hurt", accel, *rule)
    file = tmp_path / "hurt" / "00005.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    made = draw("hurt", accel, *rule).json
    assert file.read_bytes() == whole and made["until"]["images"] == 16


@pytest.mark.parametrize(
    ("rule", "metrics"),
    [
        ("ssim within 0.02", {"ssim": 0.02}),
        (" lpips  within 1e-1 and clip_score[emoji-clip-judge] within .5", {
            "lpips": 0.1, "clip_score[emoji-clip-judge]": 0.5
        }),
    ],
)  # fmt: skip
def test_rules_are_read(rule, metrics):
    assert {c.metric: c.tolerance for c in early_stop.parse(rule)} == metrics


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("ssim<0.02", "no condition"),
        ("ssim within x", "no tolerance"),
        ("ssim within -1", "positive"),
        ("psnr within 3", "Take ssim"),
        ("ssim within 2", "holds of any two runs.*further .* than 2"),
        ("lpips within 0.1 and clip_score[emoji-clip-judge] within 100", "holds of any two runs"),
        ("clip_score within 3", r"clip_score\[emoji-clip-judge\]"),
        ("sim within 3", "Did you mean 'ssim'"),
        ("ssim within 0.1 and ssim within 0.2", "twice"),
    ],
)
def test_other_rules_are_refused(rule, message):
    with pytest.raises(DiffAccelError, match=message):
        early_stop.parse(rule)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--until", "ssim within 0.1"], "Name it: --baseline"),
        (["--baseline", "base"], "goes with --until"),
        (["--baseline", "base", "--until", "ssim within 0.1", "--looks", "a"], "must be numbers"),
        (["--baseline", "base", "--until", "ssim within 0.1", "--looks", "8"], "would see 8 prompts"),
        (["--baseline", "base", "--until", "ssim within 0.1", "--seed", 1], "no picture of seed 1"),
        (["--baseline", "none", "--until", "ssim within 0.1"], "no run folder"),
    ],
)
def test_bad_input(draw, root, tmp_path, words, message):
    words = [root / word if word in ("base", "none") else word for word in words]
    done = draw("bad", "plain:steps=1,size=32", *words)
    assert done.status == 2 and message in done.err and not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_the_level_is_shared_by_conditions(root):
    from diffaccel.runs.request import Request

    request = Request(prompts=tuple(f"prompt {i}" for i in range(COUNT)), batch=4)
    early = early_stop.stopping_rule(
        "ssim within 0.5 and clip_score[emoji-clip-judge] within 90", root / "base", request
    )
    record = {"images": json.loads((root / "base" / "run.json").read_text())["images"]}
    found = early.look(root / "base", record)
    assert early.looks == (COUNT,) and found["metrics"]["ssim"]["level"] == pytest.approx(1 - 2 * 0.025)

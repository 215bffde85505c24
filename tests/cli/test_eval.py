"""``diffaccel eval``: from prompts to a report, its numbers against what they must be, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.sets.run import open_run
from diffaccel.files import sha256

PROMPTS = "a cat\na <b>dog</b>\na fish\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory, models):
    """Runs of the tiny FLUX: a baseline, the same again, fewer steps, other seeds."""
    from diffaccel.cli import main

    root = tmp_path_factory.mktemp("runs")
    (root / "p.txt").write_text(PROMPTS)
    shared = [
        "--prompts",
        root / "p.txt",
        "--model",
        models / "flux",
        "--threads",
        "1",
        "--batch",
        "2",
        "--latents",
        "--json",
    ]
    for name, accel, seed in (
        ("base", "plain:steps=3,size=32", 0),
        ("again", "euler:steps=3,size=32", 0),
        ("fewer", "dpmpp2m:steps=2,size=32", 0),
        ("other", "plain:steps=3,size=32", 50),
    ):
        words = ["eval", "run", *shared, "--accel", accel, "--seed", seed, "--out", root / name]
        assert main([str(word) for word in words]) == 0
    return root


@pytest.fixture
def compare(run, made):
    def call(*words: object):
        return run("eval", "compare", made / "base", *words)

    return call


@pytest.mark.slow
def test_runs_know_their_pictures(made):
    record = json.loads((made / "fewer" / "run.json").read_text())
    assert [image["prompt"] for image in record["images"]] == PROMPTS.split("\n")[:3]
    assert record["settings"]["methods"][0]["name"] == "dpmpp2m" and record["settings"]["latents"] is True
    assert len(record["cost"]["steps"]) == 2 and set(record["cost"]["parts"]) == {"text", "network", "decode"}
    base = json.loads((made / "base" / "run.json").read_text())
    noise = [[image["noise_sha256"] for image in each["images"]] for each in (base, record)]
    assert noise[0] == noise[1] and len(set(noise[0])) == 3


@pytest.mark.slow
def test_a_record_without_pictures_is_one_sentence(made, tmp_path):
    values = json.loads((made / "fewer" / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(values | {"images": []}))
    with pytest.raises(DiffAccelError, match=r"run\.json' lists no pictures"):
        open_run(tmp_path)


def test_what_lies_beside_a_runs_pictures_is_none_of_them(made, tmp_path, run):
    from diffaccel.eval.images.open import open_source
    from diffaccel.eval.sets.run import open_run

    folder = tmp_path / "searched"
    shutil.copytree(made / "base", folder)
    (folder / "search" / "00000").mkdir(parents=True)
    Image.new("RGB", (72, 48)).save(folder / "search" / "00000" / "reward.png")
    ids = ("00000", "00001", "00002")
    for source in (open_source(folder), open_run(folder).source):
        assert source.ids == ids and source.warnings == [] and source.sizes == {(32, 32): 3}
    assert open_source(folder, num=2).ids == ids[:2]
    said = run("eval", "paired", made / "base", folder).out
    assert "holds images of" not in said
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "state": "running"}))
    for words in (["eval", "fid", made / "base", folder], ["eval", "paired", made / "base", folder]):
        done = run(*words)
        assert done.status == 2 and "is unfinished" in done.err
    (folder / "run.json").write_text('{"by": "someone else"}')
    assert open_source(folder).ids == (*ids, "search/00000/reward")


def test_a_damaged_latent_is_made_again(made, tmp_path, run, models):
    shutil.copytree(made / "base", tmp_path / "base")
    file = tmp_path / "base" / "00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    record = json.loads((tmp_path / "base" / "run.json").read_text())
    record["state"] = "running"
    (tmp_path / "base" / "run.json").write_text(json.dumps(record))
    assert "unfinished" in run("eval", "compare", tmp_path / "base", made / "fewer").err
    words = ["--prompts", made / "p.txt", "--model", models / "flux", "--threads", 1, "--batch", 2, "--latents"]
    done = run("eval", "run", *words, "--accel", "plain:steps=3,size=32", "--out", tmp_path / "base", "--json")
    assert done.status == 0 and file.read_bytes() == whole


def test_the_numbers(compare, made):
    done = compare(made / "again", made / "fewer", "--other-seeds", made / "other", "--json")
    assert done.status == 0
    rows = {(row["metric"], row["run"]): row for row in done.json["metrics"]}
    pixels = {
        name: np.stack([np.asarray(Image.open(made / name / f"{i:05d}.png"), dtype=float) for i in range(3)])
        for name in ("base", "fewer", "other")
    }

    def psnr(one, other):
        error = ((pixels[one] - pixels[other]) ** 2).mean((1, 2, 3))
        return np.mean(20 * np.log10(255 / np.sqrt(error)))

    row = rows["psnr", "fewer"]
    assert row["value"] == pytest.approx(psnr("base", "fewer"), rel=1e-9)
    assert row["floor"] == pytest.approx(psnr("base", "other"), rel=1e-9)
    assert row["interval"]["low"] < row["value"] < row["interval"]["high"] and row["n"] == 3
    assert rows["psnr", "again"]["value"] is None and rows["psnr", "again"]["identical"]
    assert rows["latent_error", "again"]["value"] == 0 and rows["latent_error", "fewer"]["value"] > 0
    assert rows["nfe", "base"]["value"] == 3 and rows["nfe", "fewer"]["delta"] == -1
    assert rows["fd", "fewer"]["value"] is None and "3 pictures are too few" in rows["fd", "fewer"]["missing"]
    verdicts = {verdict["run"]: verdict["text"] for verdict in done.json["verdicts"]}
    assert "pixel for pixel" in verdicts["again"] and "PSNR" in verdicts["fewer"]


def test_the_report(compare, made, tmp_path):
    done = compare(made / "fewer", "--report", tmp_path / "report", "--markdown")
    assert done.status == 0
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["baseline"] == "base" and written["command"][:3] == ["diffaccel", "eval", "compare"]
    assert (tmp_path / "report" / "report.md").read_text() == done.out[:-1]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "a &lt;b&gt;dog&lt;/b&gt;" in page and "<b>dog" not in page  # prompts are text
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page  # nothing else is needed
    assert page.count("data:image/webp") == page.count('alt="') == 9 + 6 and "FID" not in page + done.out


@pytest.mark.slow
def test_timing_decides_the_ratio(compare, made, run, models, tmp_path):
    words = [
        "plain:steps=3,size=32",
        "dpmpp2m:steps=2,size=32",
        "--model",
        models / "flux",
        "--turns",
        2,
        "--warm-up",
        1,
    ]
    timed = run("eval", "time", *words, "--out", tmp_path / "t.json", "--json")
    assert timed.status == 0
    plain, fewer = timed.json["variants"]
    assert "ratio" not in plain and len(fewer["seconds"]) == 2 and len(fewer["steps"]) == 2 and fewer["nfe"] == 2
    assert fewer["energy_joules"] is None and fewer["first_call_seconds"] > 0 and fewer["set_up_seconds"] > 0
    done = run("eval", "compare", made / "base", made / "fewer", "--timing", tmp_path / "t.json", "--json")
    rows = {(row["metric"], row["run"]): row for row in done.json["metrics"]}
    assert rows["speedup", "fewer"]["value"] == pytest.approx(fewer["ratio"]["value"])
    assert rows["seconds", "base"]["value"] == pytest.approx(plain["seconds_per_image"])
    assert not any("timing" in text for text in done.json["warnings"])


@pytest.mark.parametrize(
    ("rule", "status"), [("psnr<200", 5), ("psnr<1", 0), ("psnr<1 or nfe<0", 5), ("psnr<200 and nfe>0", 0)]
)
def test_the_gate(compare, made, rule, status):
    done = compare(made / "fewer", "--fail-if", rule)
    assert done.status == status and f"fewer: {'FAILED' if status else 'passed'}" in done.err


def test_identical_pictures_pass_a_gate(compare, made):
    assert compare(made / "again", "--fail-if", "psnr<90").status == 0


def test_plain_folders_pair_by_name(made, run, tmp_path):
    for name in ("base", "fewer"):
        (tmp_path / name).mkdir()
        for file in (made / name).glob("*.png"):
            shutil.copy(file, tmp_path / name)
    done = run("eval", "compare", tmp_path / "base", tmp_path / "fewer", "--json")
    rows = {row["metric"]: row for row in done.json["metrics"]}
    assert done.status == 0 and set(rows) == {"psnr", "ssim", "fd"} and math.isfinite(rows["psnr"]["value"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "no run folder"),
        (["other"], "not paired"),
        (["base"], "Two runs are called"),
        (["fewer", "--other-seeds", "short"], "not drawn from the prompts"),
        (["short"], "2 of 3 pictures of the baseline are missing"),
        (["fewer", "--fail-if", "psnr!3"], "--fail-if|rule|psnr!3"),
        (["fewer", "--fail-if", "pnsr<3"], "psnr"),
        (["fewer", "--timing", "none.json"], "cannot be read"),
    ],
)
def test_bad_input(compare, made, run, models, words, said):
    if not (made / "short").exists():
        (made / "q.txt").write_text("a cat\n")
        args = [
            "--prompts",
            made / "q.txt",
            "--model",
            models / "flux",
            "--threads",
            1,
            "--json",
            "--out",
            made / "short",
        ]
        assert run("eval", "run", *args, "--accel", "plain:steps=3,size=32").status == 0
    done = compare(*[made / word if (made / word).exists() else word for word in words])
    assert done.status == 2 and re.search(said, done.err) and not done.out


def test_a_run_whose_pictures_are_not_those_it_wrote_is_refused(made, run, tmp_path):
    """Files of another run have the same names, and so a copy over them shows in nothing but the bytes."""
    shutil.copytree(made / "fewer", tmp_path / "fewer")
    shutil.copy(made / "base" / "00001.png", tmp_path / "fewer" / "00001.png")
    for command in (("compare", made / "base", tmp_path / "fewer"), ("fid", tmp_path / "fewer", made / "base")):
        done = run("eval", *command)
        assert done.status == 2 and re.search(r"fewer/00001\.png' has been changed since its run wrote it", done.err)


def test_pictures_of_another_size_are_refused(made, run, tmp_path):
    shutil.copytree(made / "fewer", tmp_path / "fewer")
    file, about = tmp_path / "fewer" / "00001.png", tmp_path / "fewer" / record.RUN
    before = sha256(file)
    Image.new("RGB", (16, 32)).save(file)
    about.write_text(about.read_text().replace(before, sha256(file)))
    done = run("eval", "compare", made / "base", tmp_path / "fewer")
    assert done.status == 2 and "16x32" in done.err and "32x32" in done.err


def test_help_and_unknown_commands(run):
    assert run("eval").status == 2
    assert "Did you mean 'compare'" in run("eval", "compar").err
    assert "Did you mean '--report'" in run("eval", "compare", "a", "b", "--reprot", "x").err
    assert Path("x").exists() is False

"""The options of ``eval compare`` beyond its defaults: scorers, categories, mixed counts, videos, devices."""

from __future__ import annotations

import json

import pytest
import torch

import diffaccel.eval
from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import lpips
from diffaccel.eval.sets.candidates import draw_function
from diffaccel.runs import loading
from diffaccel.runs.request import Request
from tests.support import made_runs

PROMPTS = ("a cat", "a dog", "a fish")
HERE = "tests.cli.test_eval_compare"


def levels(prompts, seeds):
    return torch.stack([torch.full((3, 16, 16), 10 * seed, dtype=torch.uint8) for seed in seeds])


def brighter(prompts, seeds):
    return levels(prompts, seeds) + 5


def brightness(images, prompts):
    return images.double().mean((1, 2, 3))


def middle(clips):
    return clips[:, clips.shape[1] // 2].float().mean((2, 3))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    for name, function, num in (("base", levels, 1), ("run", brighter, 1), ("two", brighter, 2)):
        draw_function(function, Request(prompts=PROMPTS, num=num), root / name)
    (root / "kinds.csv").write_text("prompt,category\na cat,pet\na dog,pet\na fish,wild\n")
    return root


def test_scorers_and_categories(run, drawn, tmp_path):
    words = ["--scorer", f"py:{HERE}:brightness", "--prompts", drawn / "kinds.csv", "--device", "cpu"]
    done = run("eval", "compare", drawn / "base", drawn / "run", *words, "--report", tmp_path, "--json")
    assert done.status == 0, done.err
    rows = {(row["metric"], row["run"]): row for row in done.json["metrics"]}
    assert rows[f"py:{HERE}:brightness", "run"]["delta"] == pytest.approx(5)
    assert [row[1:3] for row in done.json["sections"]["categories"]["rows"]] == [["pet", "2"], ["wild", "1"]]
    assert "By category of prompt" in (tmp_path / "report.html").read_text()
    gated = run("eval", "compare", drawn / "base", drawn / "run", *words, "--fail-if", f"py:{HERE}:brightness>4")
    assert gated.status == 5


def test_counts_may_differ_when_asked(run, drawn):
    refused = run("eval", "compare", drawn / "base", drawn / "two", "--device", "cpu")
    assert refused.status == 2 and "--allow-mixed-n" in refused.err
    done = run("eval", "compare", drawn / "base", drawn / "two", "--device", "cpu", "--allow-mixed-n", "--json")
    assert done.status == 0 and "6 pictures, base 3" in done.json["warnings"][0]
    assert next(row for row in done.json["metrics"] if row["metric"] == "psnr")["n"] == 1  # a cat of seed 0 alone


def test_lpips_computes_on_the_device(run, drawn, monkeypatch):
    def load(path, *, device):
        raise DiffAccelError(f"LPIPS of {path} on {device}.")

    monkeypatch.setattr(lpips, "load", load)
    monkeypatch.setattr(loading, "pick_device", lambda name: torch.device("meta" if name == "mps" else name))
    done = run("eval", "compare", drawn / "base", drawn / "run", "--lpips", "alex.pth", "--device", "mps")
    assert "LPIPS of alex.pth on meta." in done.err


@pytest.mark.slow
def test_videos(run, tmp_path):
    videos = [torch.stack([made_runs.blocks(10 * i + t) for t in range(5)]) for i in range(4)]
    made_runs.of_videos(tmp_path / "base", videos, ["v"] * 4)
    made_runs.of_videos(tmp_path / "run", [v // 2 for v in videos], ["v"] * 4)
    words = ["eval", "compare", tmp_path / "base", tmp_path / "run", "--device", "cpu"]
    fvd = ["--fvd", f"py:{HERE}:middle", "--clip-frames", "3", "--clip-stride", "2"]
    done = run(*words, *fvd, "--json")
    assert done.status == 0, done.err
    rows = {row["metric"]: row for row in done.json["metrics"]}
    assert rows["fvd"]["detail"]["sampling"] == {"frames": 3, "stride": 2, "start": 0, "resolution": None}
    assert {"psnr", "ssim", "psnr_drift", "flicker", "fvd"} <= rows.keys() and rows["fvd"]["value"] > 0
    assert len(done.json["curves"]["SSIM"]["run"]) == 5
    assert "go with pictures" in run(*words, "--extractor", "tiny").err
    assert "needs 16 frames" in run(*words, "--fvd", f"py:{HERE}:middle").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scorer", "hpsv3"], "Did you mean 'hpsv2'"),
        (["--fvd", f"py:{HERE}:middle"], "holds pictures, and a network of videos"),
        (["--extractor", "tiny", "--protocol", "cmmd"], "The protocol 'cmmd' is of clip"),
        (["--prompts", "emoji-1000"], "names no category of 3 of 3 prompts"),
    ],
)
def test_what_does_not_fit_is_refused(run, drawn, words, said):
    done = run("eval", "compare", drawn / "base", drawn / "run", "--device", "cpu", *words)
    assert done.status == 2 and said in done.err and not done.out


def test_a_report_is_not_written_into_the_folder_of_a_run(run, drawn, tmp_path):
    before = sorted(file.name for file in (drawn / "run").iterdir())
    done = run("eval", "compare", drawn / "base", drawn / "run", "--report", drawn / "run", "--device", "cpu")
    assert done.status == 2 and "holds a run of its own (run.json)" in done.err and "Name another folder" in done.err
    assert sorted(file.name for file in (drawn / "run").iterdir()) == before
    with pytest.raises(DiffAccelError, match="holds a run of its own"):
        diffaccel.eval.compare(drawn / "base", drawn / "run", report=drawn / "run")
    done = run("eval", "compare", drawn / "base", drawn / "run", "--report", tmp_path / "report", "--device", "cpu")
    assert done.status == 0 and f"page: {tmp_path / 'report' / 'report.html'}" in done.err


def test_one_picture_is_too_few(run, tmp_path):
    for name, function in (("one", levels), ("other", brighter)):
        draw_function(function, Request(prompts=PROMPTS[:1]), tmp_path / name)
    done = run("eval", "compare", tmp_path / "one", tmp_path / "other", "--device", "cpu")
    assert done.status == 0 and "1 picture is too few to compare" in done.out


def test_a_comparison_reads_as_json(run, drawn):
    done = run("eval", "compare", drawn / "base", drawn / "run", "--device", "cpu", "--json")
    assert json.loads(done.out)["format"] == 2


def test_csv_and_latex_and_a_page_made_anew(run, drawn, tmp_path):
    words = ["eval", "compare", drawn / "base", drawn / "run", "--device", "cpu"]
    files = ["--csv", tmp_path / "new" / "x.csv", "--tex", tmp_path / "x.tex"]
    done = run(*words, *files, "--report", tmp_path / "report")
    assert done.status == 0 and "PSNR" in done.out and "|" not in done.out
    report = tmp_path / "report"
    assert (report / "report.csv").read_text() == (tmp_path / "new" / "x.csv").read_text()
    assert "\\toprule" in (tmp_path / "x.tex").read_text()
    page = (report / "report.html").read_text()
    (report / "report.html").unlink()
    again = run("eval", "page", report / "report.json", "--csv", tmp_path / "y.csv")
    assert again.status == 0 and again.out == done.out and (report / "report.html").read_text() == page
    assert (tmp_path / "y.csv").read_text() == (report / "report.csv").read_text()
    assert run("eval", "page", tmp_path / "none").status == 2
    for option, made in (("--csv", tmp_path / "y.csv"), ("--tex", tmp_path / "x.tex")):
        printed = run("eval", "page", report / "report.json", option, "-")
        assert printed.status == 0 and printed.out == made.read_text()
        both = run("eval", "page", report / "report.json", option, "-", "--json")
        assert both.status == 2 and f"{option} - and --json both print to standard output" in both.err
    refused = run(*words, "--csv", tmp_path)  # before anything is measured
    assert refused.status == 2 and "--csv" in refused.err


def test_several_timings_are_a_table_by_batch(run, drawn, tmp_path):
    entry = {"turns": 2, "first_call_seconds": 1.0, "parts": {}, "steps": [], "seconds_per_image": 0.5}
    for images in (1, 4):
        entries = [{**entry, "name": name, "folder": name, "seconds": [0.5 * images] * 2} for name in ("base", "run")]
        timing = {"images_a_call": images, "turns": 2, "device": {"type": "cpu"}, "variants": entries}
        (tmp_path / f"{images}.json").write_text(json.dumps(timing))
    words = ["--timing", tmp_path / "1.json", "--timing", tmp_path / "4.json", "--device", "cpu", "--json"]
    done = run("eval", "compare", drawn / "base", drawn / "run", *words)
    assert done.status == 0, done.err
    numbers = done.json["sections"]["by_batch"]["numbers"]
    assert [(line["run"], line["batch"], line["throughput"]) for line in numbers] == [
        (name, batch, 2.0) for name in ("base", "run") for batch in (1, 4)
    ]

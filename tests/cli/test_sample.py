"""``diffaccel sample``: what it writes, what decides the pixels, and how a run is continued."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
import torch
from PIL import Image

import diffaccel
from diffaccel.samplers import Heun


def pixels(record: dict) -> list[str]:
    return [image["pixels_sha256"] for image in record["images"]]


def test_images_and_record(sample, tmp_path):
    done = sample("a red apple", "two cats", "--num", 2, "--seed", 7, "--batch", 3, "--out", "run", "--json")
    assert done.status == 0 and done.err == ""
    record = done.json
    assert done.out.count("\n") == 1
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {k: v for k, v in record.items() if k not in ("out", "rank", "processes", "drawn")} == stored
    assert record["drawn"] == 4
    assert record["format"] == 1 and record["kind"] == "sample" and record["state"] == "finished"
    assert record["command"][:2] == ["diffaccel", "sample"] and "two cats" in record["command"]
    assert {"python", "torch", "diffusers", "diffaccel"} <= record["versions"].keys()
    assert record["device"]["type"] == "cpu" and record["device"]["threads"] == 1
    assert record["call"] == {"num_inference_steps": 2, "height": 32, "width": 32}
    assert record["cost"]["nfe"] == record["cost"]["forwards"] == 8 and record["cost"]["calls"] == 4
    assert record["cost"]["seconds"] > 0 and record["cost"]["peak_memory"] > 0
    expected = [(0, "a red apple", 7), (1, "a red apple", 8), (2, "two cats", 9), (3, "two cats", 10)]
    assert [(i["id"], i["prompt"], i["seed"]) for i in record["images"]] == expected
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", *(f"0000{i}.png" for i in range(4))}
    for image in record["images"]:
        file = tmp_path / "run" / image["file"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == image["sha256"]
        text = json.loads(Image.open(file).text["diffaccel"])
        assert (text["id"], text["prompt"], text["seed"]) == (image["id"], image["prompt"], image["seed"])
        assert text["fingerprint"] == record["fingerprint"] and text["model_digest"]


def test_an_image_depends_on_its_own_seed_alone(sample):
    many = sample("a red apple", "two cats", "--num", 2, "--seed", 7, "--out", "many", "--json").json
    one = sample("two cats", "--seed", 10, "--out", "one", "--json").json
    assert pixels(one) == [pixels(many)[3]]
    assert len(set(pixels(many))) == 4


@pytest.mark.slow
def test_prompts_of_a_file_and_of_stdin_are_those_of_the_command_line(sample, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red apple\n\n  two cats\n")
    words = sample("a red apple", "two cats", "--num", 2, "--out", "words", "--json").json
    lines = sample("--prompts", "prompts.txt", "--num", 2, "--out", "lines", "--json").json
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a red apple\ntwo cats")))
    piped = sample("--prompts", "-", "--num", 2, "--out", "piped", "--json").json
    assert words["settings"] == lines["settings"] == piped["settings"]
    assert pixels(words) == pixels(lines) == pixels(piped)


def test_a_repeated_command_says_that_it_draws_nothing(sample, tmp_path):
    first = sample("a cat", "--num", 2, "--out", "run").out
    again = sample("a cat", "--num", 2, "--out", "run")
    assert "nothing to draw" not in first
    assert again.out.startswith(first.rstrip()) and "nothing to draw: all 2 images exist" in again.out
    (tmp_path / "run" / "00001.png").unlink()
    part = sample("a cat", "--num", 2, "--out", "run")
    assert "1 of 2 images drawn now" in part.out
    assert sample("a cat", "--num", 2, "--out", "run", "--json").json["drawn"] == 0


def test_the_name_of_a_file_is_not_drawn(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    done = sample("prompts.txt", "--out", "run")
    assert done.status == 2 and "'prompts.txt' is a file" in done.err and "--prompts prompts.txt" in done.err
    assert "Got --prompts 'prompts.txt' and 'a cat'" in sample("a cat", "--prompts", "prompts.txt").err
    assert "no prompt file 'none.txt'" in sample("--prompts", "none.txt").err
    mistyped = sample("promts.txt", "--out", "run")
    assert mistyped.status == 2 and "no file 'promts.txt'" in mistyped.err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_sampler_is_the_stock_pipeline_and_euler_equals_it(sample, models):
    stock = sample("two cats", "--guidance", 3, "--out", "stock", "--json").json
    euler = sample("two cats", "--guidance", 3, "--out", "euler", "--sampler", "euler", "--json").json
    pipe = diffaccel.load(models / "flux")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "two cats", negative_prompt="", true_cfg_scale=3.0, num_inference_steps=2, height=32, width=32,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert stock["settings"]["methods"] == []
    assert hashlib.sha256(b"RGB 32 32 " + image.tobytes()).hexdigest() == pixels(stock)[0] == pixels(euler)[0]
    costs = [{k: r["cost"][k] for k in ("nfe", "forwards", "calls")} for r in (stock, euler)]
    assert costs == [{"nfe": 2, "forwards": 4, "calls": 4}] * 2


@pytest.mark.parametrize(("sampler", "nfe"), [("heun", 3), ("dpmpp2m", 2), ("ancestral", 2)])
def test_samplers_and_their_options(sample, sampler, nfe):
    options = ["--ancestral.eta", "0.5"] if sampler == "ancestral" else [f"--{sampler}.max-batch=1"]
    record = sample("two cats", "--sampler", sampler, *options, "--out", sampler, "--json").json
    method = record["settings"]["methods"][0]
    assert method["name"] == sampler and record["cost"]["nfe"] == nfe
    assert method["eta"] == 0.5 if sampler == "ancestral" else method["max_batch"] == 1


def test_joint_branches_are_counted_once_as_nfe(sample):
    """Stable Diffusion sends both branches of a guided prediction through its network in one call."""
    stock = sample("two cats", "--guidance", 5, "--negative", "blurry", "--out", "a", "--json", model="sd").json
    assert {k: stock["cost"][k] for k in ("nfe", "forwards", "calls")} == {"nfe": 2, "forwards": 4, "calls": 2}
    assert stock["call"]["guidance_scale"] == 5 and stock["call"]["negative_prompt"] == "blurry"


def test_options_and_prompts_in_any_order(sample):
    record = sample("--num", 1, "two cats", "--out", "a", "--json", "--", "--a dashed prompt").json
    assert [image["prompt"] for image in record["images"]] == ["two cats", "--a dashed prompt"]


def test_size_is_width_by_height(sample):
    record = sample("two cats", "--size", "48x32", "--out", "a", "--json").json
    assert (record["call"]["height"], record["call"]["width"]) == (32, 48)
    assert Image.open("a/00000.png").size == (48, 32)


def test_without_out_a_repeated_command_finds_its_folder(sample, tmp_path):
    first, again = (sample("Two cats!", "--json").json for _ in range(2))
    other = sample("Two cats!", "--seed", 1, "--json").json
    assert {**first, "drawn": 0} == again and first["out"].startswith("out/two-cats-")
    assert other["out"] != first["out"] and len(list((tmp_path / "out").iterdir())) == 2


def test_readable_summary(sample):
    done = sample("two cats", "--num", 2, "--sampler", "heun", "--out", "a")
    assert "2 images in a: 00000.png ... 00001.png" in done.out and "heun: 2 steps, 6 NFE" in done.out


def test_finished_run_is_not_made_again(sample, monkeypatch):
    first = sample("two cats", "--out", "a", "--json").json
    monkeypatch.setattr("diffaccel.runs.loading.open_pipeline", lambda *a: pytest.fail("the model was opened"))
    assert sample("two cats", "--out", "a", "--json").json == {**first, "drawn": 0}


@pytest.mark.slow
def test_only_missing_and_damaged_chunks_are_made_again(sample, tmp_path):
    command = ("two cats", "--num", 6, "--batch", 2, "--sampler", "ancestral", "--out", "a", "--json")
    first = sample(*command).json
    folder = tmp_path / "a"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    (folder / "00001.png").unlink()
    (folder / "00004.png").write_bytes((folder / "00004.png").read_bytes()[:-50])
    (folder / ".00005.png.0badf00d.tmp").touch()
    again = sample(*command).json
    assert again["images"] == first["images"]
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert {name for name in before if after[name] == before[name]} == {"00002.png", "00003.png"}
    assert not list(folder.glob(".*"))


def test_another_command_is_refused_by_what_differs(sample, tmp_path):
    sample("two cats", "--num", 2, "--out", "a")
    files = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    done = sample("two cats", "--num", 2, "--out", "a", "--seed", 4, "--sampler", "heun", "--batch", 2)
    assert done.status == 2 and done.out == ""
    assert "seed: 0 -> 4" in done.err and "batch: 1 -> 2" in done.err and "methods" in done.err
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files
    replaced = sample("a red apple", "--out", "a", "--overwrite", "--json")
    assert replaced.status == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"run.json", "00000.png"}


def test_other_weights_are_another_run(sample, models, tmp_path):
    import shutil

    shutil.copytree(models / "flux", tmp_path / "changed")
    weights = tmp_path / "changed" / "vae" / "diffusion_pytorch_model.safetensors"
    sample("two cats", "--out", "a")
    same = sample("two cats", "--model", tmp_path / "changed", "--out", "a")
    assert "model: " in same.err and "model_digest" not in same.err
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "model_digest" in sample("two cats", "--model", tmp_path / "changed", "--out", "a").err


def test_images_of_others_are_left_alone(sample, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "00003.png")
    for extra in ((), ("--overwrite",)):
        done = sample("two cats", "--out", "a", *extra)
        assert done.status == 2 and "00003.png" in done.err
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["00003.png"]


def test_record_tells_how_to_make_the_image_in_python(sample, models):
    """The record's call and methods are all that is needed."""
    record = sample("two cats", "--sampler", "heun", "--heun.state", "stock", "--out", "a", "--json").json
    pipe = diffaccel.load(models / "flux")
    pipe.set_progress_bar_config(disable=True)
    diffaccel.accelerate(pipe, Heun.from_dict(record["settings"]["methods"][0]))
    image = pipe(
        record["images"][0]["prompt"],
        generator=torch.Generator().manual_seed(record["images"][0]["seed"]),
        **record["call"],
    ).images[0]
    assert hashlib.sha256(b"RGB 32 32 " + image.tobytes()).hexdigest() == pixels(record)[0]

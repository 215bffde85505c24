"""``diffaccel eval clip`` and ``eval paired``: pictures by their prompts, and against their pairs."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics import clip_score as alignment
from diffaccel.eval.metrics import paired
from diffaccel.eval.networks import lpips, weights
from diffaccel.eval.networks.extractors import as_clip, extractor

PROMPTS = ["a red apple", "a blue heart", "a rocket", "two cats"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Eight pictures: a; b, each channel of them five levels brighter; one of them under another name; small ones."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b", "renamed", "small", "wide"):
        (root / name).mkdir()
    for i in range(8):
        pixels = np.asarray(Image.fromarray(draw.integers(0, 250, (4, 4, 3), dtype=np.uint8)).resize((32, 32), 0))
        Image.fromarray(pixels).save(root / "a" / f"{i}.png")
        Image.fromarray(pixels + 5).save(root / "b" / f"{i}.png")
        Image.fromarray(pixels).save(root / "renamed" / f"{'x' if i == 3 else i}.png")
        Image.fromarray(pixels[:8, :8]).save(root / "small" / f"{i}.png")
        Image.fromarray(np.concatenate([pixels, pixels], 1)).save(root / "wide" / f"{i}.png")
    (root / "prompts.txt").write_text("\n".join(PROMPTS * 2))
    (root / "few.txt").write_text("\n".join(PROMPTS))
    return root


@pytest.fixture(autouse=True)
def nothing_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def rows(done) -> dict[str, dict]:
    assert done.status == 0, done.err
    return {row["metric"]: row for row in done.json["metrics"]}


def tensor(folder: Path) -> torch.Tensor:
    return next(images for _, images in open_source(folder).batches(8))


# -- paired -----------------------------------------------------------------------------------------------------------


def test_a_constant_offset(run, sets):
    done = run("eval", "paired", sets / "a", sets / "b", "--json")
    found = rows(done)
    psnr = 20 * np.log10(255 / 5)
    for name in ("mean", "median", "p95"):
        assert found["psnr"]["detail"][name] == pytest.approx(psnr, abs=1e-9)
    assert found["psnr"]["value"] == pytest.approx(psnr) and found["psnr"]["unit"] == "dB"
    ssim = paired.ssim(tensor(sets / "a"), tensor(sets / "b"))
    assert found["ssim"]["value"] == pytest.approx(float(ssim.mean()), rel=1e-12)
    assert found["ssim"]["interval"]["low"] < found["ssim"]["value"] < found["ssim"]["interval"]["high"]
    assert found["ssim"]["detail"]["worst"] == [str(i) for i in torch.argsort(ssim, stable=True).tolist()]
    assert found["lpips"]["value"] is None and "alexnet-owt-7be5be79.pth" in found["lpips"]["missing"]
    assert found["psnr"]["n"] == 8 and found["psnr"]["run"] == "b"


def test_identical_pictures_have_no_infinite_number(run, sets):
    done = run("eval", "paired", sets / "a", sets / "a", "--json")
    found = rows(done)
    assert found["psnr"]["value"] is None and found["psnr"]["identical"] and "Infinity" not in done.out
    assert found["ssim"]["value"] == 1
    text = run("eval", "paired", sets / "a", sets / "a")
    assert "identical" in text.out and "LPIPS-Alex is not measured" in text.err


def test_lpips_with_weights(run, sets, tmp_path):
    generator = torch.Generator().manual_seed(0)
    state, channels = {}, 3
    for block in lpips.BACKBONES["alex"].blocks:
        for index, out, kernel in block:
            weight = torch.randn(out, channels, kernel, kernel, generator=generator) / (channels * kernel**2) ** 0.5
            state |= {f"features.{index}.weight": weight, f"features.{index}.bias": torch.zeros(out)}
            channels = out
    torch.save(state, tmp_path / "alex.pth")
    done = run(
        "eval", "paired", sets / "a", sets / "b", "--lpips", tmp_path / "alex.pth", "--metrics", "lpips", "--json"
    )
    (row,) = done.json["metrics"]
    expected = lpips.load(tmp_path / "alex.pth")(tensor(sets / "a"), tensor(sets / "b"))
    assert row["value"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert len(row["detail"]["weights_sha256"]) == 64


def test_any_container_pairs_by_name(run, sets, tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in (sets / "b").iterdir():
            archive.write(file, file.name)
    for other in (sets / "b", tmp_path / "b.zip"):
        found = rows(run("eval", "paired", sets / "a", other, "--metrics", "psnr", "--num", 3, "--json"))
        assert found["psnr"]["n"] == 3 and list(found) == ["psnr"]


@pytest.mark.slow
def test_runs_have_latents_and_prompts(run, models, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    common = ("--prompts", tmp_path / "p.txt", "--model", models / "flux", "--threads", 1, "--latents")
    for name, variant in (("base", "plain:steps=2,size=32"), ("fast", "euler:steps=1,size=32")):
        done = run("eval", "run", *common, "--accel", variant, "--out", tmp_path / name, "--json")
        assert done.status == 0, done.err
    found = rows(run("eval", "paired", tmp_path / "base", tmp_path / "fast", "--json"))
    assert found["latent_error"]["value"] > 0 and found["latent_error"]["n"] == 2
    clip = run("eval", "clip", tmp_path / "fast", "--pairs", tmp_path / "base", "--json")
    assert set(rows(clip)) == {"clip_score", "clip_score_w2.5", "clip_i"}  # the prompts are in the run
    refused = run("eval", "clip", tmp_path / "fast", "--prompts", tmp_path / "p.txt")
    assert refused.status == 2 and "Leave --prompts out" in refused.err


# -- clip -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conventions_of_the_score(run, sets):
    done = run("eval", "clip", sets / "a", "--prompts", sets / "prompts.txt", "--pairs", sets / "b", "--json")
    found, clip = rows(done), as_clip(extractor("emoji-clip-judge"))
    a, b, texts = clip(tensor(sets / "a")), clip(tensor(sets / "b")), clip.texts(PROMPTS * 2)
    values = alignment.clip_score(a, texts)
    score = found["clip_score"]
    assert score["key"] == "clip_score[emoji-clip-judge]" and score["value"] == pytest.approx(float(values.mean()))
    assert score["interval"]["method"].startswith("studentised bootstrap over 4 clusters")  # prompts, not pictures
    assert score["delta"] == pytest.approx(float((values - alignment.clip_score(b, texts)).mean()), abs=1e-9)
    w25 = found["clip_score_w2.5"]
    assert w25["value"] == pytest.approx(0.025 * float(values.mean()))
    assert w25["interval"]["low"] == pytest.approx(0.025 * score["interval"]["low"])
    assert found["clip_i"]["value"] == pytest.approx(float(alignment.clip_i(a, b).mean()))
    assert score["detail"]["truncated"] == 0 and len(score["detail"]["weights_sha256"]) == 64


@pytest.mark.slow
def test_numbered_pictures_meet_their_prompts(run, sets, tmp_path):
    for numbers, folder in ((range(12), "plain"), ([*range(11), 12], "gap")):
        (tmp_path / folder).mkdir()
        for i, number in enumerate(numbers):
            shutil.copy(sets / "a" / f"{i % 8}.png", tmp_path / folder / f"{number}.png")
    texts = [PROMPTS[i % 4] for i in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    clip = as_clip(extractor("emoji-clip-judge"))
    images = tensor(sets / "a")
    expected = alignment.clip_score(clip(images[[i % 8 for i in range(12)]]), clip.texts(texts)).mean()
    for folder in ("plain", "gap"):
        done = run("eval", "clip", tmp_path / folder, "--prompts", tmp_path / "prompts.txt", "--json")
        assert rows(done)["clip_score"]["value"] == pytest.approx(float(expected))
        warned = " ".join(json.loads(done.out)["warnings"])
        assert (f"to '12' with '{texts[-1]}'" in warned) == (folder == "gap")


def test_pairs_alone_need_no_prompts(run, sets):
    found = rows(run("eval", "clip", sets / "a", "--pairs", sets / "a", "--json"))
    assert list(found) == ["clip_i"] and found["clip_i"]["value"] == pytest.approx(1, abs=1e-6)


def test_cut_prompts_are_counted(run, sets, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join([*PROMPTS, *(["very " * 200 + "long"] * 4)]))
    done = run("eval", "clip", sets / "a", "--prompts", tmp_path / "long.txt")
    assert done.status == 0 and "4 of 8 prompts are longer than emoji-clip-judge reads" in done.err
    assert done.out.startswith("clip_score[emoji-clip-judge]: ") and done.out.count("\n") == 2


BAD = {
    "no prompts": ("clip a", 2, "--prompts FILE"),
    "prompts of another number": ("clip a --prompts few.txt", 2, "8 images, but 4 prompts"),
    "no clip": ("clip a --prompts prompts.txt --clip tiny", 2, "reads no texts"),
    "no weights of the clip": ("clip a --prompts prompts.txt --clip open_clip:ViT-L-14:openai", 6, "not found"),
    "more than there are": ("clip a --prompts prompts.txt --num 9", 2, "9 images were asked for"),
    "not paired": ("paired a renamed", 2, "1 of 8 pictures of the baseline are missing in it, such as '3'"),
    "clip of what is not paired": ("clip a --pairs renamed", 2, "not paired"),
    "another size": ("paired a wide", 2, "Make both at one size"),
    "too small by name": ("paired small small --metrics ssim", 2, "window of 11x11"),
    "lpips by name": ("paired a b --metrics lpips", 6, "alexnet-owt-7be5be79.pth"),
    "latents by name": ("paired a b --metrics latent_error", 2, "--latents"),
    "metric": ("paired a b --metrics psnrr", 2, "Did you mean 'psnr'"),
    "nothing there": ("paired a none", 2, "There is no run folder"),
    "more pairs than there are": ("paired a b --num 9", 2, "9 pairs were asked for"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run, sets, case):
    words, status, said = BAD[case]
    there = {path.name for path in sets.iterdir()} | {"none"}
    done = run("eval", *[sets / word if word in there else word for word in words.split()])
    assert done.status == status and said in done.err and not done.out
    assert done.err.count("\n") == 1 and "Traceback" not in done.err


def test_small_pictures_leave_out_what_cannot_be_measured(run, sets):
    found = rows(run("eval", "paired", sets / "small", sets / "small", "--json"))
    assert found["psnr"]["identical"] and "under 11 pixels" in found["ssim"]["missing"]

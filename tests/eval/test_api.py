"""``diffaccel.eval.compare``: every kind of candidate gives the pictures it must, on the same prompts and seeds."""

from __future__ import annotations

import pytest
import tiny
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.eval import api
from diffaccel.eval.sets import requests
from diffaccel.eval.sets.run import open_run
from diffaccel.runs.request import Request
from diffaccel.samplers import DPMpp2M, Euler, Heun
from tests.layout import tree

CALL = {"size": (32, 32), "steps": 3, "threads": 1, "batch": 2}
PLAIN = {"extractors": (), "other_seeds": False}


@pytest.fixture(scope="module")
def pipe():
    return tiny.make("flux")


def levels(prompts, seeds):
    """A picture of one grey level, that of its seed."""
    return torch.stack([torch.full((3, 16, 16), seed, dtype=torch.uint8) for seed in seeds])


def brighter(prompts, seeds):
    return levels(prompts, seeds) + 2


def test_functions_are_called_with_the_same_prompts_and_seeds():
    called = []

    def watched(prompts, seeds):
        called.append((list(prompts), list(seeds)))
        return levels(prompts, seeds)

    found = api.compare(watched, brighter, prompts=["a", "b"], seeds=range(10, 14), **PLAIN, batch=3)
    assert called == [(["a", "a", "b"], [10, 11, 12]), (["b"], [13])]
    assert found.row("psnr", "brighter").value == pytest.approx(20 * torch.log10(torch.tensor(255 / 2)).item())
    assert found.row("seconds", "brighter") is not None and found.row("nfe", "brighter") is None


@pytest.mark.slow
def test_sides_of_one_pipeline(pipe, tmp_path):
    """A config, a variant's word, a run's folder and a pipeline with methods on it are the same way to draw."""
    prompts = ["a cat", "a fish", "a house"]
    diffaccel.accelerate(pipe, Heun())
    try:
        found = api.compare(
            "plain", Heun(), "heun", pipe, [Euler()], prompts=prompts, out=tmp_path, model=pipe, **CALL, **PLAIN
        )
        assert [m["name"] for m in diffaccel.summary(pipe).methods] == ["heun"]  # as it was
    finally:
        diffaccel.remove(pipe)
    assert [run.name for run in found.runs] == ["heun", "heun-2", "heun-3", "euler"]
    pixels = [[i["pixels_sha256"] for i in run.record["images"]] for run in (found.baseline, *found.runs)]
    assert pixels[1] == pixels[2] == pixels[3] and pixels[0] == pixels[4] != pixels[1]
    seeds = {tuple(picture.seed for picture in run.pictures) for run in found.runs}
    assert seeds == {(0, 1, 2)}

    again = api.compare(tmp_path / "plain", DPMpp2M(), model=pipe, **PLAIN)  # prompts, seeds, size, steps: the run's
    assert again.runs[0].prompts == prompts and again.row("nfe", "dpmpp2m").value == 3
    assert again.runs[0].record["settings"]["size"] == [32, 32]


def test_a_kept_folder_is_not_drawn_again(tmp_path):
    calls = []

    def counted(prompts, seeds):
        calls.append(len(seeds))
        if len(calls) == 2:
            raise RuntimeError("stopped")
        return levels(prompts, seeds)

    ways = dict(prompts=["a", "b", "c"], batch=1, out=tmp_path, **PLAIN)
    with pytest.raises(RuntimeError, match="stopped"):
        api.compare(counted, brighter, **ways)
    api.compare(counted, brighter, **ways)
    api.compare(counted, brighter, **ways)
    assert calls == [1, 1, 1, 1]  # the first one, the one that stopped, and the two that were left
    assert len(open_run(tmp_path / "counted")) == 3


def test_a_temporary_folder_lives_as_long_as_the_comparison():
    found = api.compare(levels, brighter, prompts=["a", "b"], **PLAIN)
    folder = found.baseline.path
    assert folder.is_dir() and found.baseline.image(1).unique().tolist() == [1]
    del found
    assert not folder.exists()


def test_other_seeds_are_other_pictures(tmp_path):
    found = api.compare(levels, brighter, prompts=["a", "b"], seeds=5, extractors=(), out=tmp_path)
    others = open_run(tmp_path / "levels-other-seeds")
    assert [picture.seed for picture in others.pictures] == [7, 8]
    assert found.row("psnr", "brighter").floor == pytest.approx(found.row("psnr", "brighter").value)  # two levels each


def test_it_shows_itself_and_reports(tmp_path):
    found = api.compare(levels, brighter, prompts=["a", "b"], report=tmp_path, **PLAIN)
    assert repr(found) == found.table() and "PSNR" in found.table() and "42.11" in found.table()
    assert {path.name for path in tmp_path.iterdir()} >= {"report.json", "report.md", "report.html"}


def test_pipelines_that_draw_from_noise(tmp_path):
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "noise")
    model = str(tmp_path / "noise")
    found = api.compare("plain:steps=3", "plain:steps=2", model=model, seeds=range(4), threads=1, extractors=())
    row = found.row("ssim", "plain-steps=2")
    assert row.n == 4 and row.interval is not None and row.floor is not None
    assert found.baseline.prompts is None
    with pytest.raises(DiffAccelError, match="takes no prompt"):
        api.compare("plain", "plain:steps=2", model=model, prompts=["a cat"])


@pytest.mark.parametrize(
    ("sides", "options", "message"),
    [
        ((levels, 7), {}, "A side of a comparison is int"),
        ((levels, Euler), {}, "pass an instance: Euler"),
        ((levels, "dpmp2m"), {}, "Did you mean 'dpmpp2m'"),
        ((levels, "no/such/folder"), {}, "no run folder"),
        ((levels, brighter), {"seeds": [0, 2]}, "consecutive"),
        ((levels, brighter), {"seeds": range(3)}, "evenly"),
        ((levels, brighter), {"stepz": 3}, "stepz"),
        ((levels, brighter), {"turns": 3}, "Only variants and configs can be timed"),
        ((levels, lambda prompts, seeds: [1, 2]), {}, "must return a uint8 tensor"),
        ((levels, lambda prompts, seeds: levels(prompts, seeds[:1])), {}, "returned 1 pictures for 2 seeds"),
        ((levels, lambda prompts, seeds: levels(prompts, seeds).float()), {}, "must be uint8"),
    ],
)
def test_what_cannot_be_compared(sides, options, message):
    with pytest.raises(DiffAccelError, match=message):
        api.compare(*sides, **({"prompts": ["a", "b"]} | PLAIN | options))


def test_a_runs_settings_give_its_request():
    request = Request(
        prompts=("a",), model="mine", num=2, seed=3, steps=4, size=(32, 48), guidance=2.0, batch=5, threads=1,
        dtype="float32", device="cpu", methods=(Heun(),), latents=True,
    )  # fmt: skip
    settings = request.settings("", torch.device("cpu"), torch.float32)
    again = requests.from_settings(settings)
    assert again.methods == () and again.settings("", torch.device("cpu"), torch.float32) == {**settings, "methods": []}


def test_importing_it_is_light(tmp_path):
    out = tree.python("-c", "import sys, diffaccel.eval; print(*sys.modules)", cwd=tmp_path)
    assert {"torch", "numpy", "diffusers"}.isdisjoint(out.stdout.split())

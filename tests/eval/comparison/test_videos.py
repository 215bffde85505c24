"""Runs of videos: fidelity by frames, drift, flicker and the distance by a network, against sums done here."""

from __future__ import annotations

import functools
import io
import json
import re
from dataclasses import replace

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import compare_runs, fidelity, videos
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.metrics import frechet, video
from diffaccel.eval.metrics.video import FrameSampling
from diffaccel.eval.networks import by_spec as networks
from diffaccel.eval.networks.extractors import extractor
from diffaccel.eval.report import console, write
from diffaccel.eval.sets.run import open_run
from tests.support import made_runs

PROMPTS = ["a cat", "a cat", "a fish", "a house"]
SAMPLING = FrameSampling(frames=4)


def grey(levels) -> torch.Tensor:
    """A video of one grey level a frame."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)


def colours(clips: torch.Tensor) -> torch.Tensor:
    """Features of a clip: the mean colour of its first and of its last frame."""
    return clips[:, [0, -1]].float().mean((3, 4)).flatten(1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    base = [grey([60, 60, 60, 60, 60, 60]), grey([20, 40, 60, 80, 100, 120])] * 2
    drifting = [v + torch.arange(6, dtype=torch.uint8).view(-1, 1, 1, 1) * 4 for v in base]
    made = {"base": base, "same": base, "drifting": drifting, "other": [v + 40 for v in base]}
    return {
        name: made_runs.of_videos(root / name, some, PROMPTS, first_seed=9 * (name == "other"))
        for name, some in made.items()
    }


@functools.cache
def decoded(path):
    run = open_run(path)
    return torch.stack([run.video(i) for i in range(len(run))]).double()


def pixels(run):
    return decoded(run.path)


@pytest.fixture(scope="module")
def compared(sets):
    return compare_runs(sets["base"], [sets["same"], sets["drifting"]], Measures(others=sets["other"]))


@pytest.mark.slow
def test_a_folder_of_videos_is_a_run(sets):
    run = open_run(sets["base"].path)
    assert run.is_video and len(run) == 4 and run.prompts is None
    assert run.video(1).shape == (6, 3, 32, 32) and run.video(1).dtype == torch.uint8
    assert run.video(1).double().mean((1, 2, 3)).tolist() == pytest.approx([20, 40, 60, 80, 100, 120], abs=2)


@pytest.mark.slow
def test_fidelity_is_of_whole_videos_and_of_every_frame(sets, compared):
    found = compared
    error = (pixels(sets["drifting"]) - pixels(sets["base"])).square()
    whole = 10 * torch.log10(255**2 / error.mean((1, 2, 3, 4)))
    row = found.row("psnr", "drifting")
    assert row.value == pytest.approx(float(whole.mean()), rel=1e-9) and row.n == 4
    assert found.pair_values(row).tolist() == pytest.approx(whole.tolist(), rel=1e-9)
    by_frame = 10 * torch.log10(255**2 / error.mean((2, 3, 4)))
    curve = found.curves["PSNR"]["drifting"]
    pooled = 10 * torch.log10(255**2 / error.mean((2, 3, 4)).mean(0))  # the first frames are equal in all videos
    assert torch.allclose(curve, pooled) and curve[0] == torch.inf and by_frame.isfinite()[:, 1:].all()
    slopes = [video.drift(one) for one in by_frame]
    drift = found.row("psnr_drift", "drifting")
    assert drift.value == pytest.approx(sum(slopes) / 4) and drift.value < -2 and drift.unit == "dB/frame"
    assert found.row("psnr", "same").identical and "no video has two frames" in found.row("psnr_drift", "same").missing
    far = (pixels(sets["other"]) - pixels(sets["base"])).square().mean((1, 2, 3, 4))
    assert row.floor == pytest.approx(float((10 * torch.log10(255**2 / far)).mean()))
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_flicker_is_read_as_a_difference(sets, compared):
    found = compared
    flicker = {name: (pixels(sets[name])[:, 1:] - pixels(sets[name])[:, :-1]).abs().mean((1, 2, 3, 4)) for name in sets}
    base, row = found.row("flicker", "base"), found.row("flicker", "drifting")
    assert base.value == pytest.approx(float(flicker["base"].mean())) and base.delta is None
    assert row.delta == pytest.approx(float((flicker["drifting"] - flicker["base"]).mean()))
    assert row.delta_interval.low > 0 and row.better == "lower"


@pytest.mark.slow
def test_the_distance_by_a_network(sets):
    network = networks.Network("colours", colours, SAMPLING, "0123")
    found = compare_runs(sets["base"], [sets["drifting"]], Measures(others=sets["other"], video=network))
    row = found.row("fvd", "drifting")
    x, y = (colours(pixels(sets[name])[:, :4]) for name in ("drifting", "base"))
    assert row.value == pytest.approx(frechet.distance_of_features(x, y), rel=1e-5)
    assert row.key == "FVD[colours]" and row.floor > row.value and row.detail["sampling"]["frames"] == 4


def test_networks_of_videos_by_their_words(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return clips.float().mean((1, 3, 4))

    file = tmp_path / "mean.pt"
    torch.jit.script(Mean()).save(str(file))
    clips = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    loaded = networks.of_videos(f"torchscript:{file}", SAMPLING, torch.device("cpu"))
    assert torch.equal(loaded.function(clips), clips.float().mean((1, 3, 4))) and len(loaded.weights_sha256) == 64
    imported = networks.of_videos("py:tests.eval.comparison.test_videos:colours", SAMPLING, torch.device("cpu"))
    assert torch.equal(imported.function(clips), colours(clips)) and imported.sampling is SAMPLING
    for spec, message in (
        ("i3d", "no network of videos"),
        ("py:nowhere:f", "no callable"),
        ("py:tests.eval.comparison.test_videos:PROMPTS", "not callable"),
    ):
        with pytest.raises(DiffAccelError, match=message):
            networks.of_videos(spec, SAMPLING, torch.device("cpu"))


@pytest.mark.slow
def test_what_videos_cannot_be_measured_by(sets, tmp_path):
    with pytest.raises(DiffAccelError, match="hold videos, and tiny go with pictures"):
        compare_runs(sets["base"], [sets["same"]], Measures(extractors=[extractor("tiny")]))
    short = made_runs.of_videos(tmp_path / "short", [v[:3] for v in pixels(sets["base"]).byte()], PROMPTS)
    with pytest.raises(DiffAccelError, match="has 3 frames of 32x32, and its pair in 'base' has 6 frames"):
        compare_runs(sets["base"], [short])


def test_whole_and_mean_curves():
    psnr, ssim = fidelity.BUILT_IN
    errors = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    curve = 10 * torch.log10(255**2 / errors)
    expected = (20 * torch.log10(255 / errors.mean().sqrt())).item()
    assert videos.video_values(psnr, [curve]).item() == pytest.approx(expected)
    assert videos.video_values(ssim, [curve]).item() == pytest.approx(float(curve.mean()))
    assert videos.video_values(psnr, [torch.tensor([torch.inf, torch.inf]).double()]).item() == torch.inf
    two = [torch.tensor([1.0, torch.inf, 3.0]), torch.tensor([3.0, 5.0])]
    assert videos.mean_curve(ssim, [two[0][[0, 2]], two[1]]).tolist() == [2.0, 4.0]
    half = 5 + 10 * torch.log10(torch.tensor(2.0)).item()  # half of the error: the other video's frame is equal
    both = -10 * torch.log10(torch.tensor((10**-0.1 + 10**-0.3) / 2)).item()
    assert videos.mean_curve(psnr, two).tolist() == pytest.approx([both, half])


@pytest.mark.slow
def test_the_report_of_videos(sets, tmp_path):
    found = compare_runs(sets["base"], [sets["drifting"], sets["same"]])
    made = write(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert made["curves"]["PSNR"]["same"] == [None] * 6
    assert "Fidelity over the frames" in page and "4 videos a run" in page and "first, the middle and the last" in page
    assert page.count('class="curve"') == 3  # PSNR of one run that differs, SSIM of both
    assert "pixel for pixel the baseline's videos" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_all_files_of_a_report_speak_of_videos(sets, tmp_path):
    settings = {"settings": {"prompts": [], "batch": 4}, "device": {"name": "cpu"}}
    runs = []
    for name, seconds in (("base", 4.0), ("same", 2.0)):
        cost = {"seconds": seconds, "nfe": 8, "forwards": 8, "parts": {"network": seconds / 2}, "steps": [0.1] * 8}
        runs.append(replace(sets[name], record={**settings, "cost": cost}))
    comparison = compare_runs(runs[0], runs[1:])
    made = write(comparison, tmp_path / "report", pairs=1)
    texts = [(tmp_path / "report" / f"report.{ending}").read_text() for ending in ("html", "md", "csv", "tex")]
    for text in (*texts, console.text(made, io.StringIO()), comparison.table()):
        assert not re.findall(r".{20}\bpictures?\b.{20}", text)
    assert "Cost of a video" in texts[1] and "seconds a video" in texts[0] and "4 videos in a call" in texts[2]

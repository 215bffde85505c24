"""Flicker, drift, clips and their distance, and the files for VBench."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import frechet
from diffaccel.eval.metrics.paired import psnr
from diffaccel.eval.metrics.video import (
    NAME_BYTES,
    FrameSampling,
    clip_features,
    drift,
    frame_curves,
    fvd,
    temporal_flicker,
    vbench_export,
)


def video(frames: int, height: int = 16, width: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


# -- frames -----------------------------------------------------------------------------------------------------------


def test_flicker_is_the_mean_step_between_frames() -> None:
    still = video(1).expand(5, -1, -1, -1)
    assert temporal_flicker(still) == 0
    levels = torch.tensor([10, 13, 9, 250], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 6, 6)
    assert temporal_flicker(levels) == pytest.approx((3 + 4 + 241) / 3, rel=1e-14)  # unsigned steps must not wrap
    half = still.clone()
    half[2, :, :, :10] += 7
    assert temporal_flicker(half) == pytest.approx(7 * 0.5 * 2 / 4, rel=1e-14)


def test_curves_are_paired_metrics_by_frame_and_drift_is_their_slope() -> None:
    a = video(6)
    b = a + torch.arange(1, 7, dtype=torch.uint8).view(6, 1, 1, 1)
    curves = frame_curves(a, b, lpips=lambda x, y: (x.double() - y.double()).abs().mean((1, 2, 3)))
    assert set(curves) == {"psnr", "ssim", "lpips"} and set(frame_curves(a, b)) == {"psnr", "ssim"}
    assert curves["psnr"].tolist() == pytest.approx([20 * math.log10(255 / k) for k in range(1, 7)])
    assert torch.equal(curves["psnr"], psnr(a, b))
    assert drift(curves["lpips"]) == pytest.approx(1.0, rel=1e-12)
    assert drift(5 - 0.25 * torch.arange(9)) == pytest.approx(-0.25)
    assert drift(torch.full((4,), 3.0)) == 0


def test_drift_leaves_identical_frames_out() -> None:
    curve = torch.tensor([math.inf, math.inf, 40.0, math.inf, 34.0, 31.0])
    assert drift(curve) == pytest.approx(-3.0)
    assert drift(torch.tensor([math.inf, math.inf])) is None
    assert drift(torch.tensor([math.inf, 30.0])) is None


# -- Fréchet distance -------------------------------------------------------------------------------------------------


def test_sampling_takes_the_frames_that_it_names() -> None:
    frames = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 8, 8)
    clip = FrameSampling(frames=4, stride=3, start=2).clip(frames)
    assert clip[:, 0, 0, 0].tolist() == [2, 5, 8, 11]
    assert len(FrameSampling(frames=4, stride=5, start=4).clip(frames)) == 4
    with pytest.raises(DiffAccelError, match="needs 21 frames, and the video has 20"):
        FrameSampling(frames=4, stride=5, start=5).clip(frames)


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (21, 16), (7, 9)])
def test_sampling_resizes_the_shorter_side_and_cuts_the_centre(size: tuple[int, int]) -> None:
    ramp = torch.linspace(0, 255, size[1]).round().to(torch.uint8).expand(2, 3, *size)
    clip = FrameSampling(frames=2, resolution=8).clip(ramp)
    assert clip.shape == (2, 3, 8, 8) and clip.dtype == torch.uint8
    row = clip[0, 0, 0].double()
    assert (row + row.flip(0)).sub(255).abs().max() <= 12  # the centre of the ramp stays in the centre
    exact = video(2, 8, 8)
    assert torch.equal(FrameSampling(frames=2, resolution=8).clip(exact), exact)


def test_fvd_is_the_frechet_distance_of_clip_features_with_its_record() -> None:
    sampling = FrameSampling(frames=3, stride=2, resolution=8)
    seen: list[tuple[int, ...]] = []

    def network(clips: Tensor) -> Tensor:
        seen.append(tuple(clips.shape))
        return clips.double().mean((3, 4)).flatten(1)[:, :4]

    a = clip_features((video(6, seed=i) for i in range(10)), network, sampling, batch=4)
    b = clip_features([video(6, seed=i) // 2 for i in range(10, 22)], network, sampling)
    assert seen[:3] == [(4, 3, 3, 8, 8), (4, 3, 3, 8, 8), (2, 3, 3, 8, 8)] and a.shape == (10, 4)
    got = fvd(a, b, sampling=sampling, extractor="i3d", weights_sha256="ab12")
    assert got.value == frechet.distance_of_features(a, b) > 100
    assert json.loads(json.dumps(got.to_dict())) == {
        "key": "FVD[i3d]",
        "value": got.value,
        "n": 10,
        "m": 12,
        "extractor": "i3d",
        "weights_sha256": "ab12",
        "sampling": {"frames": 3, "stride": 2, "start": 0, "resolution": 8},
    }


# -- VBench -----------------------------------------------------------------------------------------------------------


def files(folder: Path, count: int, tag: str = "v") -> list[Path]:
    made = [folder / f"{tag}{i}.mp4" for i in range(count)]
    for path in made:
        path.write_bytes(path.name.encode())
    return made


def test_export_names_videos_as_vbench_finds_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = "A 3D model of a 1800s victorian house."
    made = vbench_export({plain: files(tmp_path, 5)}, out)
    assert list(made) == [f"{plain}-{i}.mp4" for i in range(5)] and set(made.values()) == {plain}
    assert [(out / name).read_bytes() for name in made] == [f"v{i}.mp4".encode() for i in range(5)]
    assert json.loads((out / "prompts.json").read_text()) == made
    assert sorted(path.name for path in out.iterdir()) == sorted([*made, "prompts.json"])
    assert vbench_export({plain: files(tmp_path, 5)}, out) == made  # again, over the first


def test_any_prompt_has_a_file_name_of_its_own(tmp_path: Path) -> None:
    hard = [
        "a/b",
        "a_b",
        "../../etc/x",
        "",
        ".hidden",
        "雪" * 200,
        "雪" * 201,
        "A Cat",
        "a cat",
        "two\nlines",
        "x" * 240,
    ]
    sources = {prompt: files(tmp_path, 1, f"s{i}-") for i, prompt in enumerate(hard)}
    out = tmp_path / "out"
    made = vbench_export(sources, out, a_prompt=1)
    assert list(made.values()) == hard
    assert len({name.casefold() for name in made}) == len(hard)
    assert "a_b-0.mp4" in made and "A Cat-0.mp4" in made
    for i, name in enumerate(made):
        assert len(name.encode()) <= NAME_BYTES and "/" not in name and not name.startswith(".")
        assert (out / name).read_bytes() == f"s{i}-0.mp4".encode()
    assert {path.parent for path in out.rglob("*")} == {out}


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    def refused(message: str, call) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(DiffAccelError, match=message):
            call()

    refused("the video has 1", lambda: temporal_flicker(video(1)))
    refused("frames must be uint8, not torch.float32", lambda: temporal_flicker(video(2).float()))
    refused(r"one shape; got \(3, 3, 16, 20\) and \(4, 3, 16, 20\)", lambda: frame_curves(video(3), video(4)))
    refused("1 of them NaN", lambda: drift(torch.tensor([1.0, math.nan])))
    refused("stride and resolution >= 1", lambda: FrameSampling(stride=0))
    refused("stride and resolution >= 1", lambda: FrameSampling(resolution=0))
    sampling = FrameSampling(frames=2)
    refused("no video", lambda: clip_features([], lambda x: x, sampling))
    refused(r"return \(2, d\); got \(2, 2, 3, 16, 20\)", lambda: clip_features([video(2)] * 2, lambda x: x, sampling))
    refused("differ in size", lambda: clip_features([video(2), video(2, 18)], lambda x: x, sampling))
    refused("no prompt", lambda: vbench_export({}, tmp_path / "o"))
    refused("'cat' has 4 videos, and 5 are wanted", lambda: vbench_export({"cat": files(tmp_path, 4)}, tmp_path / "o"))
    gone = [tmp_path / "gone.mp4"]
    refused(r"gone.mp4' of 'cat' is no .mp4 file", lambda: vbench_export({"cat": gone}, tmp_path / "o", a_prompt=1))
    assert not (tmp_path / "o").exists()

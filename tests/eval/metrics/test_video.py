"""Flicker, drift, clips and their distance."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import frechet
from diffaccel.eval.metrics.video import (
    FrameSampling,
    clip_features,
    drift,
    fvd,
    temporal_flicker,
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


def test_drift_is_the_slope_of_a_curve() -> None:
    assert drift(torch.arange(1, 7)) == pytest.approx(1.0, rel=1e-12)
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
        "interval": None,
        "n": 10,
        "m": 12,
        "extractor": "i3d",
        "weights_sha256": "ab12",
        "sampling": {"frames": 3, "stride": 2, "start": 0, "resolution": 8},
    }


def test_thirty_clips_have_an_interval() -> None:
    a = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    b, names = a + 0.1 * a.flip(1) + 0.5, {"extractor": "i3d", "weights_sha256": ""}
    own = fvd(a, b, sampling=FrameSampling(), pairs=[(i, i) for i in range(30)], **names).interval
    fixed = fvd(a, b, sampling=FrameSampling(), **names).interval
    assert own is not None and fixed is not None and own.low < own.value < own.high < fixed.high
    assert fvd(a[:29], b, sampling=FrameSampling(), **names).interval is None


def test_errors_say_what_is_wrong() -> None:
    def refused(message: str, call) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(DiffAccelError, match=message):
            call()

    refused("the video has 1", lambda: temporal_flicker(video(1)))
    refused("frames must be uint8, not torch.float32", lambda: temporal_flicker(video(2).float()))
    refused("1 of them NaN", lambda: drift(torch.tensor([1.0, math.nan])))
    refused("stride and resolution >= 1", lambda: FrameSampling(stride=0))
    refused("stride and resolution >= 1", lambda: FrameSampling(resolution=0))
    sampling = FrameSampling(frames=2)
    refused("no video", lambda: clip_features([], lambda x: x, sampling))
    refused(r"return \(2, d\); got \(2, 2, 3, 16, 20\)", lambda: clip_features([video(2)] * 2, lambda x: x, sampling))
    refused("differ in size", lambda: clip_features([video(2), video(2, 18)], lambda x: x, sampling))

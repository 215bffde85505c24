"""The comparison of recipes on video models: what is asked of a network, what is measured, and how runs go on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffaccel.models.next_frame.transformer import NextFrameTransformer
from scripts import qvgen_video
from scripts.qvgen_beds import report, wan, world
from scripts.qvgen_beds.clips import Clips
from scripts.qvgen_beds.held import estimate_errors, held_errors


class FakePool:
    """Clips of random frames, in the place of played games."""

    def __init__(self, count: int, length: int, side: int = 64) -> None:
        draw = torch.Generator().manual_seed(length)
        self.frames = torch.randint(0, 256, (count, length, 3, side, side), generator=draw, dtype=torch.uint8)
        self.actions = torch.randint(0, 9, (count, length), generator=draw)
        self.starts = torch.arange(count)

    def clips(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        return self.frames[starts], self.actions[starts]


def test_decibels_of_errors_that_are_a_multiple_have_an_interval_of_no_width():
    errors = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    found = report.gain([0.5 * errors, 0.25 * errors], [errors, errors])
    assert found.value == pytest.approx(15 * math.log10(2)) and found.high - found.low < 1e-9
    holed = torch.cat([errors, torch.tensor([math.nan], dtype=torch.float64)])
    assert report.gain([0.5 * holed], [holed]).value == pytest.approx(10 * math.log10(2))


def test_an_interval_of_decibels_is_that_of_clips_drawn_anew():
    draw = torch.Generator().manual_seed(0)
    common = torch.rand(400, generator=draw, dtype=torch.float64) + 0.5
    seeds = [common * (0.8 + 0.4 * torch.rand(400, generator=draw, dtype=torch.float64)) for _ in range(2)]
    found = report.gain(seeds, [common])
    rows = torch.randint(400, (2000, 400), generator=draw)
    again = 10 * torch.log10(common[rows].mean(1) / torch.stack([e[rows].mean(1) for e in seeds])).mean(0)
    low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))


def test_the_norm_of_early_gradients_is_a_mean_over_steps(tmp_path: Path):
    entries = [
        {"step": 2, "loss": 1.0, "norm": 9.0},
        {"step": 2, "loss": 1.0, "norm": 4.0},  # after a kill, step 2 was made again
        {"step": 10, "loss": 1.0, "norm": 1.0},
        {"step": 10, "distance": 0.5},
        {"step": 30, "loss": 1.0, "norm": 100.0},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    log = report.log_of(tmp_path)
    assert [entry["step"] for entry in log] == [2, 10, 10, 30]
    assert report.early_norm(log, 50) == pytest.approx((2 * 4.0 + 8 * 1.0) / 10)
    assert report.early_norm(log, 5) == 4.0  # the first entry counts always


def test_clean_estimates_of_a_network_that_says_nothing():
    pool = FakePool(5, 2, side=8)
    clips = Clips(pool, 4, 0, (3, 2, 8, 8), wan.arrange(2))
    net = torch.nn.Linear(1, 1)
    model = SimpleNamespace(network=net, ask=lambda network, x, sigma, group: x * (network is not net))
    levels = (0.25, 1.0)
    silent = held_errors(model, clips, net, levels)
    assert silent["loss"].shape == (4, 2) and bool((silent["distance"] == 0).all())
    x0 = clips.rows(0, 4)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    expected = (levels[0] * (eps - x0)).double().square().flatten(1).mean(1)  # x_t is its own estimate
    torch.testing.assert_close(estimate_errors(silent["loss"], levels)[:, 0], expected, rtol=1e-6, atol=0)
    other = held_errors(model, clips, torch.nn.Linear(1, 1), levels)
    torch.testing.assert_close(other["distance"][:, 1], eps.double().square().flatten(1).mean(1), rtol=1e-6, atol=0)
    assert len(set(clips.starts.tolist())) == 4 and clips.identity != Clips(pool, 4, 1, (3, 2, 8, 8), None).identity


def small_world() -> NextFrameTransformer:
    torch.manual_seed(0)
    net = NextFrameTransformer(
        height=16, width=16, patch_size=8, num_layers=2, num_attention_heads=1, attention_head_dim=16, window=4,
        modulation="shared", prediction="sample",
    )  # fmt: skip
    for p in net.parameters():
        if float(p.detach().abs().max()) == 0:
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


@torch.no_grad()
def test_noisy_frames_are_asked_as_the_sampler_asks_them():
    """Each is the last frame of a clip whose earlier frames are those that are looked back at."""
    net = small_world()
    model = world.World(net, FakePool(3, 4, side=16), 2, 0, context=3, queries=2, batch=2, context_noise=0.1)
    draw = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(2, 2, 3, 16, 16, generator=draw), torch.tensor([0.3, 0.9])
    asked = model.ask(net, x, sigma, 0)
    frames, actions = model.clips.taken(0, 2)
    torch.testing.assert_close(model.clips.rows(0, 2), frames[:, 2:])  # the frames that are noise, clean
    noise = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    held = 0.9 * frames[:, :3] + 0.1 * noise
    for place, before in ((0, 2), (1, 3)):
        levels = torch.full((2, before + 1), 0.1)
        levels[:, -1] = sigma
        clip = torch.cat([held[:, :before], x[:, place : place + 1]], 1)
        alone = net(clip, levels, actions[:, : before + 1])[:, -1]
        torch.testing.assert_close(asked[:, place], alone, rtol=1e-4, atol=1e-4)


def call(monkeypatch: pytest.MonkeyPatch, work: Path, *words: object) -> int:
    given = ["--recipe", "tiny", "--work", work, "--out", work / "out", "--measuring", 0, "--bits", 4, *words]
    monkeypatch.setattr(sys, "argv", ["qvgen_video", *map(str, given)])
    return qvgen_video.main()


@pytest.mark.slow
def test_runs_go_on_and_end_in_a_table_with_curves(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(qvgen_video, "Pool", lambda *_: FakePool(6, 3))
    words = ("--beds", "wan", "--seeds", 0, "--ways", "qvgen", "lsq", "dsa")
    assert call(monkeypatch, tmp_path, *words, "--minutes", 0) == qvgen_video.UNFINISHED
    assert call(monkeypatch, tmp_path, *words) == 0
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "wan").rglob("*.*")}
    assert call(monkeypatch, tmp_path, *words) == 0
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "wan").rglob("*.*")}
    told: dict[str, Any] = json.loads((tmp_path / "out" / "qvgen_video_cpu.json").read_text())["wan"]
    rows = {row["way"]: row for row in told["rows"]}
    assert [rows[way]["steps"] for way in ("qvgen", "lsq", "dsa")] == [4, 4, 2]
    column = rows["qvgen"]["columns"]["clean estimate at 0.5"]
    assert column["over full precision"]["low"] <= column["over full precision"]["high"] and "over lsq" in column
    assert "| W4A4 | dsa | 2 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "qvgen_video_wan_cpu.png").stat().st_size > 10_000
    assert not list((tmp_path / "wan").rglob("checkpoint*"))
    with pytest.raises(SystemExit, match="Did you mean 'runs'"):
        call(monkeypatch, tmp_path, "--stages", "run")

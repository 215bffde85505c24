"""Eight Gaussians on a ring: a generator of one or two steps that sliced distances cannot tell from the data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffaccel.distill.drawing import generate
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.distill.teacher import NetworkTeacher

RADIUS, SPREAD, MODES = 1.3, 0.1, 8
SAMPLES = 40_000


class Flow(nn.Module):
    """A velocity field on the plane, with Fourier features of the level."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        angles = sigma[:, None].to(x) * math.pi * torch.tensor([0.5, 1, 2, 4])
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], dim=1))


def data(count: int, generator: torch.Generator) -> Tensor:
    mode = torch.randint(MODES, (count,), generator=generator) * (2 * math.pi / MODES)
    centre = RADIUS * torch.stack([mode.cos(), mode.sin()], dim=1)
    return centre + SPREAD * torch.randn(count, 2, generator=generator)


def train(steps: int = 3000, batch: int = 512) -> Flow:
    torch.manual_seed(0)
    network, generator = Flow(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps) + 0.01)
        x0, eps = data(batch, generator), torch.randn(batch, 2, generator=generator)
        sigma = torch.rand(batch, generator=generator)
        x = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
        loss = (network(x, sigma) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def of_teacher(teacher: NetworkTeacher, x: Tensor, steps: int = 100) -> Tensor:
    """Draw by Euler's method."""
    with torch.no_grad():
        for step in range(steps):
            sigma = torch.full((len(x),), 1 - step / steps)
            x = x - teacher.ask(teacher.network, x, sigma, 0) / steps
    return x


def sliced(a: Tensor, b: Tensor) -> float:
    """Return the mean distance of sorted projections on 64 directions."""
    angles = torch.arange(64) * (math.pi / 64)
    directions = torch.stack([angles.cos(), angles.sin()])
    first, second = (np.sort((directions.t() @ x.t()).numpy()) for x in (a, b))  # ten times as fast as torch's
    return float(np.abs(first - second).mean(dtype=np.float64))


def shares(x: Tensor) -> Tensor:
    mode = torch.remainder(torch.round(torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi / MODES)), MODES)
    return torch.bincount(mode.long(), minlength=MODES) / len(x)


@pytest.fixture(scope="module")
def taught() -> tuple[NetworkTeacher, float, float]:
    """Return the teacher, its distance from the data, and how far other data may be from the data."""
    generator = torch.Generator().manual_seed(2)
    floor = [sliced(data(SAMPLES, generator), data(SAMPLES, generator)) for _ in range(12)]
    limit = sum(floor) / len(floor) + 4 * float(torch.tensor(floor).std())
    teacher = NetworkTeacher(train(), lambda network, x, sigma, _: network(x, sigma), "velocity", (2,))
    own = sliced(of_teacher(teacher, torch.randn(SAMPLES, 2, generator=generator)), data(SAMPLES, generator))
    return teacher, own, limit


@pytest.mark.slow
@pytest.mark.parametrize(("calls", "match"), [(1, "mixture"), (2, "mixture"), (2, "last")])
def test_a_student_is_as_near_to_the_data_as_other_data(
    taught: tuple[NetworkTeacher, float, float], calls: int, match: str, tmp_path: Path
) -> None:
    """Where the mixture of all calls is matched, it is near; where the last one is, that is."""
    teacher, own, limit = taught
    generator = torch.Generator().manual_seed(1)
    config = SIM(
        steps=1000, student_steps=calls, student_match=match, batch=512, lr=1e-3, flat=0.3, floor=0.02,
        noise_ratio=4.0, ema_pictures=20_000,
    )  # fmt: skip
    run = Distillation(teacher, config, tmp_path)
    z = torch.randn(SAMPLES, 2, generator=generator)
    fresh = torch.randn(calls - 1, SAMPLES, 2, generator=generator) if calls > 1 else None
    turn = torch.arange(SAMPLES) % calls if match == "mixture" else None
    with torch.no_grad():
        undistilled = sliced(generate(teacher, run.generator, z, 0, config, fresh, turn), data(SAMPLES, generator))
    assert run.run()
    with torch.no_grad(), run.average:
        drawn = generate(teacher, run.generator, z, 0, config, fresh, turn)
    distance = sliced(drawn, data(SAMPLES, generator))
    print(
        f"{calls} calls, {match}: sliced distance {distance:.4f}, of data {limit:.4f} at most, of the teacher "
        f"{own:.4f}, before {undistilled:.4f}; shares {shares(drawn)}"
    )
    assert distance <= limit + own
    assert undistilled > (10 if calls == 1 else 4) * distance
    assert 0.09 <= float(shares(drawn).min()) and float(shares(drawn).max()) <= 0.16

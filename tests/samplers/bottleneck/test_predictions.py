"""The planner's speeds of full-size models, on the meta device, against those of SPEED's rule (arXiv 2605.18736)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import networks
import pytest
from stage_bed import flux_levels, target, wan_levels
from torch import Tensor

from diffaccel.families.flops import flops
from diffaccel.families.spectra import SPECTRA
from diffaccel.samplers import Bottleneck
from diffaccel.samplers.bottleneck.plan import ResolutionPlan, cost_of
from diffaccel.samplers.bottleneck.stages import spectral

FLUX, WAN = SPECTRA[0.3611, 16], SPECTRA[None, 16]
TWO, THREE = (0.5, 1.0), (0.5, 0.75, 1.0)
WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}


@pytest.fixture(scope="module")
def flux() -> Any:
    return networks.make("FluxTransformer2DModel", "meta", guidance_embeds=True)


@pytest.fixture(scope="module")
def wan() -> Any:
    return networks.make("WanTransformer3DModel", "meta", **WAN_1_3B)


def plan(network: Any, size: tuple[int, int], levels: Tensor, scales: tuple[float, ...], tolerance: float) -> Any:
    """Plan a call as :meth:`Bottleneck.plan` does, from a network of real size and a schedule alone."""
    is_video = type(network).__name__.startswith("Wan")
    config = Bottleneck(preset="speed", scales=scales, tolerance=tolerance)
    stages = spectral(target(*size, levels), scales, WAN if is_video else FLUX, tolerance)
    frames, branches = (21, 2) if is_video else (1, 1)
    costs = {
        stage.size: flops(
            network, batch=branches, height=stage.size[0] // 8, width=stage.size[1] // 8, frames=frames, text=512
        )
        for stage in stages
    }
    plain = (len(levels) - 1) * costs[size] / 1e12
    return ResolutionPlan(config, cost_of(stages, costs), plain)


@pytest.mark.parametrize(
    ("steps", "tolerance", "scales", "leaves", "speed"),
    [
        (50, 0.05, TWO, (28,), 1.66),
        (50, 0.05, THREE, (28, 34), 1.82),
        (50, 0.01, TWO, (18,), 1.34),
        (50, 0.01, THREE, None, 1.45),
        (28, 0.05, THREE, None, 1.83),
    ],
)
def test_flux_of_1024_pixels(flux: Any, steps: int, tolerance: float, scales: Any, leaves: Any, speed: float) -> None:
    planned = plan(flux, (1024, 1024), flux_levels(steps), scales, tolerance)
    assert planned.speedup == pytest.approx(speed, rel=5e-3)
    if leaves:
        assert ends(planned) == leaves


@pytest.mark.parametrize(
    ("size", "tolerance", "scales", "leaves", "speeds"),
    [
        ((720, 1280), 0.01, TWO, (30,), (2.19, 2.21)),
        ((720, 1280), 0.01, THREE, None, (2.65, 2.65)),
        ((720, 1280), 0.05, TWO, (39,), (3.40, 3.46)),
        ((720, 1280), 0.05, THREE, None, (4.11, 4.20)),
        ((480, 832), 0.05, TWO, (33,), (2.39, 2.39)),
        ((480, 832), 0.05, THREE, None, (2.90, 2.90)),
        ((480, 832), 0.01, THREE, None, (1.96, 1.96)),
    ],
)
def test_wan_of_1_3_billion_weights(
    wan: Any, size: tuple[int, int], tolerance: float, scales: Any, leaves: Any, speeds: tuple[float, float]
) -> None:
    """Two numbers are those of 23 and of 22 rows of tokens in the small stage, whose half is 22.5; ours has 22."""
    planned = plan(wan, size, wan_levels(50), scales, tolerance)
    assert speeds[0] * 0.995 <= planned.speedup <= speeds[1] * 1.005
    if leaves:
        assert ends(planned) == leaves


def ends(planned: ResolutionPlan) -> tuple[int, ...]:
    """Return the steps at which all stages but the last are left."""
    return tuple(accumulate(stage.steps for stage in planned.stages[:-1]))

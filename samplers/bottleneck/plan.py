"""Predict what a call in stages costs, in FLOPs of the network, before anything is measured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.families.flops import flops
from diffaccel.flow import LINEAR
from diffaccel.samplers.bottleneck.stages import Stage, Target
from diffaccel.session import Session, open_session

SCALES = ((0.5, 1.0), (0.5, 0.75, 1.0))
TOLERANCES = tuple(round(10 ** (-3 + place / 16), 5) for place in range(48))  # .001 to .87


@dataclass(frozen=True)
class PlannedStage:
    """Steps at one size, and what they cost.

    Attributes:
        size: height and width in pixels.
        first_level, last_level: noise levels on the linear path.
        tflop: of all its network calls, in 10^12.
    """

    size: tuple[int, int]
    steps: int
    first_level: float
    last_level: float
    tflop: float


@dataclass(frozen=True)
class ResolutionPlan:
    """The prediction for one call in stages; prints as a table.

    Attributes:
        config: the sampler that was planned.
        tflop: of all network calls.
        plain_tflop: of as many steps at full size.
        speedup: the ratio of both: what a GPU would gain whose time follows the FLOPs, without encoders and decoder.
    """

    config: Any
    stages: tuple[PlannedStage, ...]
    plain_tflop: float

    @property
    def tflop(self) -> float:
        """Cost of all network calls in 10^12 operations."""
        return sum(stage.tflop for stage in self.stages)

    @property
    def speedup(self) -> float:
        """Predicted speed of the denoising loop against as many steps at full size."""
        return self.plain_tflop / self.tflop

    def against(self, steps: int) -> float:
        """Return the predicted speed against another number of steps at full size."""
        return self.speedup * steps / sum(stage.steps for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as a dict for records."""
        return {
            "config": self.config.to_dict(),
            "stages": [asdict(stage) for stage in self.stages],
            "tflop": self.tflop,
            "plain_tflop": self.plain_tflop,
            "speedup": self.speedup,
        }

    def __str__(self) -> str:
        lines = [f"{'size':>11} {'steps':>6} {'noise levels':>16} {'TFLOP':>10}"]
        for stage in self.stages:
            span = f"{stage.first_level:.3f} to {stage.last_level:.3f}"
            lines.append(f"{size_text(*stage.size):>11} {stage.steps:>6} {span:>16} {stage.tflop:>10.4g}")
        steps = sum(stage.steps for stage in self.stages)
        lines.append(f"predicted: {self.speedup:.2f}x of {steps} steps at full size ({self.plain_tflop:.4g} TFLOP)")
        return "\n".join(lines)


def target_of(session: Session, *, needs_grid: bool = True) -> Target:
    """Return what the rules need to know of a call; of one that keeps its size, rows and columns may be unknown."""
    if needs_grid and not _has_grid(session):
        raise DiffAccelError(
            f"{type(session.pipe).__name__} keeps its latents as {tuple(session.x.shape)}, without rows and columns "
            f"that are known here for {size_text(session.height, session.width)}, so their resolution cannot change. "
            "Pass height and width if the call leaves them out, or use a sampler that keeps the resolution, such as "
            "Euler."
        )
    levels = session.sigmas.detach().to("cpu", torch.float64)
    if session.path is not LINEAR:
        levels = LINEAR.at(session.path.rho(levels))
    size = session.height, session.width
    if not needs_grid:
        return Target(size, levels, 1, 1)
    return Target(size, levels, session.family.multiple(session.pipe), session.latent_pixels)


def _has_grid(session: Session) -> bool:
    """Return whether the last two axes of the latents are the rows and columns of the picture, as many pixels each."""
    shape, (height, width) = session.x.shape, (session.height, session.width)
    if len(shape) not in (4, 5) or not height or not width:
        return False
    return height % shape[-2] == 0 and width % shape[-1] == 0 and height // shape[-2] == width // shape[-1]


def cost_of(stages: list[Stage], costs: Mapping[tuple[int, int], int]) -> tuple[PlannedStage, ...]:
    """Return stages with their cost, from the FLOPs of one prediction at each size."""
    return tuple(
        PlannedStage(
            stage.size,
            stage.steps,
            float(stage.levels[0]),
            float(stage.levels[-1]),
            stage.steps * costs[stage.size] / 1e12,
        )
        for stage in stages
    )


def plan_call(pipe: Any, config: Any, arguments: dict[str, Any]) -> ResolutionPlan:
    """Plan one call of a pipeline, opened but not run."""
    if not callable(getattr(config, "stages", None)) or isinstance(config, type):
        name = config.__name__ if isinstance(config, type) else type(config).__name__
        raise DiffAccelError(f"Got {name} as config; pass Bottleneck with its options, as Bottleneck(preset='speed').")
    with _opened(pipe, arguments) as session:
        return plan_session(session, config)


def plan_session(session: Session, config: Any) -> ResolutionPlan:
    """Plan a call that is open."""
    stages, _ = config.stages(session)
    sizes = {stage.size for stage in stages} | {(session.height, session.width)}
    costs = {size: prediction_flops(session, size) for size in sizes}
    plain = (len(session.sigmas) - 1) * costs[session.height, session.width] / 1e12
    return ResolutionPlan(config, cost_of(stages, costs), plain)


def reach(cls: type[Any], pipe: Any, speedup: float, arguments: dict[str, Any]) -> ResolutionPlan:
    """Return the plan of the least tolerance whose predicted speed is at least ``speedup``.

    Raises:
        DiffAccelError: where no tolerance reaches it, with the best that can be had, and for what is no speed.
    """
    is_number = isinstance(speedup, int | float) and not isinstance(speedup, bool)
    if not is_number or not 1 <= speedup < math.inf:
        raise DiffAccelError(
            f"target_speedup is {speedup!r}; it must be a number from 1, the speed at full size, as 1.3."
        )
    with _opened(pipe, arguments) as session:
        best: ResolutionPlan | None = None
        for tolerance in TOLERANCES:
            for scales in SCALES:
                plan = plan_session(session, cls(preset="speed", scales=scales, tolerance=tolerance))
                if plan.speedup >= speedup:
                    return plan
                best = plan if best is None or plan.speedup > best.speedup else best
    reached = "" if best is None else f" The best is {best.speedup:.2f}x, with tolerance {best.config.tolerance}."
    raise DiffAccelError(
        f"No plan of {len(session.sigmas) - 1} steps reaches {speedup}x.{reached} Ask for fewer steps."
    )


def prediction_flops(session: Session, size: tuple[int, int]) -> int:
    """Count the FLOPs of one guided prediction for all rows of a call, at a picture's size in pixels."""
    family, cond = session.family, session.conds[0]
    branches = 1 if family.guidance_scale(session.pipe, cond.arguments, session.timesteps[0]) is None else 2
    text = next((value for name, value in cond.positive.items() if name == "encoder_hidden_states"), None)
    factor = session.latent_pixels
    return flops(
        session.denoiser,
        batch=len(session.x) * branches,
        height=size[0] // factor,
        width=size[1] // factor,
        frames=session.x.shape[2] if session.x.ndim == 5 else 1,
        text=text.shape[1] if isinstance(text, Tensor) else None,
    )


def _opened(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Open a session of a call; the prompt is empty unless one is given."""
    if not hasattr(pipe, "scheduler"):
        raise DiffAccelError(f"Got {type(pipe).__name__}; pass a diffusers pipeline, such as FluxPipeline.")
    takes = inspect.signature(type(pipe).__call__).parameters
    given = any(name in arguments for name in ("prompt", "prompt_embeds"))
    return open_session(pipe, **({"prompt": ""} if "prompt" in takes and not given else {}), **arguments)

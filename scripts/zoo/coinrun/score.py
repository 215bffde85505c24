"""Numbers of a world model on games that training never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.eval.metrics.world_model import (
    changes_within,
    mean_difference,
    psnr,
    seen_before,
    squared_error,
)
from diffaccel.eval.networks.inverse_dynamics import CONTEXT, InverseDynamics, action_accuracy
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from scripts.zoo.coinrun.forks import Forks, policy_actions
from scripts.zoo.coinrun.pool import to_unit
from scripts.zoo.coinrun.simulator import SIZE

HORIZONS = (1, 2, 4, 8)
EARLY, LATE = (20, 120), (400, 500)  # frames of a long video that are compared
_BATCH = 256


def draw(
    pipe: NextFramePipeline, given: Tensor, given_actions: Tensor, actions: Tensor, steps: int, seed: int = 0
) -> Tensor:
    """Draw the frames that follow given uint8 ones, ``(N, H, C, H, W)`` in [-1, 1] on the CPU; row i has seed + i."""
    device, drawn = pipe.transformer.device, []
    for start in range(0, len(given), _BATCH):
        part = slice(start, start + _BATCH)
        rows = len(given[part])
        frames = pipe(
            actions[part].to(device), to_unit(given[part]).to(device), given_actions[part].to(device),
            num_inference_steps=steps, seeds=range(seed + start, seed + start + rows),
        ).frames  # fmt: skip
        drawn.append(frames.float().cpu())
    return torch.cat(drawn)


def by_horizon(errors: Tensor, rows: dict[int, Tensor] | None = None) -> dict[str, float | None]:
    """Return the PSNR of errors ``(N, H)`` at each horizon, over all clips or over those that ``rows`` names for it."""
    horizons = [h for h in HORIZONS if h <= errors.shape[1]]
    values = {h: float(psnr(errors[:, h - 1] if rows is None else errors[rows[h], h - 1])) for h in horizons}
    return {str(h): round(value, 2) if math.isfinite(value) else None for h, value in values.items()}


def seen_mask(forks: Forks) -> Tensor:
    """Return ``(N, H, 64, 64)``, the pixels of the true branch that a given frame shows."""
    return seen_before(forks.given_camera, forks.camera, SIZE, SIZE)


def changed_clips(forks: Forks) -> dict[int, Tensor]:
    """Return the clips whose action changes within each horizon, ``(N,)`` bool."""
    present, actions = forks.given_actions[:, -1], forks.actions["true"]
    return {h: changes_within(present, actions, h) for h in HORIZONS}


def references(forks: Forks) -> dict[str, Any]:
    """Return what needs no model: PSNR of the last given frame, and of the simulator under other actions."""
    truth, seen, changed = to_unit(forks.frames["true"]), seen_mask(forks), changed_clips(forks)
    last = to_unit(forks.given[:, -1:]).expand_as(truth)
    result: dict[str, Any] = {
        "clips": len(forks),
        "clips whose action changes": {str(h): int(rows.sum()) for h, rows in changed.items()},
        "share of pixels seen before": {str(h): round(float(seen[:, h - 1].double().mean()), 3) for h in HORIZONS},
    }
    for name, frames in (
        ("last frame", last), ("repeat", to_unit(forks.frames["repeat"])), ("random", to_unit(forks.frames["random"])),
    ):  # fmt: skip
        seen_errors = squared_error(frames, truth, seen)
        result[f"{name}: PSNR"] = by_horizon(squared_error(frames, truth))
        result[f"{name}: PSNR, seen before"] = by_horizon(seen_errors)
        result[f"{name}: PSNR, seen before, action changes"] = by_horizon(seen_errors, changed)
    return result


def follow(pipe: NextFramePipeline, dynamics: InverseDynamics | None, forks: Forks, steps: int) -> dict[str, Any]:
    """Return PSNR by horizon under the true actions, delta-PSNR, and the share of actions that are read right."""
    truth, seen = to_unit(forks.frames["true"]), seen_mask(forks)
    obeyed = draw(pipe, forks.given, forks.given_actions, forks.actions["true"], steps)
    other = draw(pipe, forks.given, forks.given_actions, forks.actions["random"], steps)
    result: dict[str, Any] = {"steps": steps}
    for name, mask in (("", None), (", seen before", seen)):
        right, wrong = (by_horizon(squared_error(frames, truth, mask)) for frames in (obeyed, other))
        result[f"PSNR{name}"] = right
        result[f"delta-PSNR{name}"] = {h: _minus(value, wrong[h]) for h, value in right.items()}
    result["PSNR, seen before, action changes"] = by_horizon(squared_error(obeyed, truth, seen), changed_clips(forks))
    counterfactual = to_unit(forks.frames["random"])
    result["PSNR of the random branch, by its own actions"] = by_horizon(squared_error(other, counterfactual))
    if dynamics is not None:
        before = to_unit(forks.given[:, 1 - CONTEXT :])
        taken = torch.cat([forks.given_actions[:, 1 - CONTEXT :], forks.actions["true"]], 1)
        read = [_read(pipe, dynamics, torch.cat([before, frames], 1), taken) for frames in (truth, obeyed)]
        result["actions read, real"], result["actions read, drawn"] = read
        result["actions read, ratio"] = round(read[1] / max(read[0], 1e-9), 4)
    return result


def _minus(right: float | None, wrong: float | None) -> float | None:
    return None if right is None or wrong is None else round(right - wrong, 2)


def _read(pipe: NextFramePipeline, dynamics: InverseDynamics, clips: Tensor, actions: Tensor) -> float:
    device = pipe.transformer.device
    return round(action_accuracy(dynamics, clips.to(device), actions.to(device), batch=16), 4)


def drift(
    pipe: NextFramePipeline,
    dynamics: InverseDynamics | None,
    forks: Forks,
    steps: int,
    videos: int,
    frames: int = LATE[1],
) -> tuple[dict[str, Any], Tensor]:
    """Return how the last frames of long videos differ from early ones, and the videos, ``(N, T, C, H, W)``."""
    actions = policy_actions(videos, frames, seed=7)
    drawn = draw(pipe, forks.given[:videos], forks.given_actions[:videos], actions, steps, seed=1000)
    result: dict[str, Any] = {"steps": steps, "videos": videos, "frames": frames}
    early, late = EARLY, (frames - (LATE[1] - LATE[0]), frames)
    for name, (begin, end) in (("early", early), ("late", late)):
        part = drawn[:, begin:end]
        result[f"{name}: mean difference of frames"] = round(float(mean_difference(part).mean()), 4)
        if dynamics is not None:
            result[f"{name}: actions read"] = _read(pipe, dynamics, part, actions[:, begin:end])
    for name in ("mean difference of frames", "actions read"):
        if f"early: {name}" in result:
            ratio = result[f"late: {name}"] / max(result[f"early: {name}"], 1e-9)
            result[f"late over early: {name}"] = round(ratio, 3)
    return result, drawn


def score(
    pipe: NextFramePipeline, dynamics: InverseDynamics | None, forks: Forks, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Return :func:`follow` for each number of steps."""
    return [follow(pipe, dynamics, forks, count) for count in steps]

"""Held-out clips at fixed noise levels: the loss against the data, and the distance to the network that is followed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scripts.qvgen_beds.clips import Clips

EACH = 16  # clips of a batch


@torch.no_grad()
def held_errors(
    model: Any, clips: Clips, network: nn.Module, levels: tuple[float, ...], count: int | None = None
) -> dict[str, Tensor]:
    """Return mean squares of every clip at every level, fp64 ``(N, L)`` on the CPU.

    ``loss`` is ``|v - (eps - x0)|^2`` and ``distance`` ``|v - v_followed|^2``; noise is the same at every call. The
    error of the clean estimate ``x_t - sigma v`` is ``sigma^2`` times the loss.

    Args:
        model: what is followed, which knows the conditions of these clips.
        network: with or without few bits.
        count: of the first clips; all by default.
    """
    total = len(clips.prompts) if count is None else min(count, len(clips.prompts))
    each = min(EACH, total)
    parts: dict[str, list[Tensor]] = {"loss": [], "distance": []}
    device = next(model.network.parameters()).device
    for group in range(-(-total // each)):
        x0 = clips.rows(group, each)
        eps = torch.randn(x0.shape, generator=torch.Generator("cpu").manual_seed(group), dtype=torch.float32)
        eps = eps.to(device)
        rows: dict[str, list[Tensor]] = {"loss": [], "distance": []}
        for level in levels:
            sigma = torch.full((each,), level, dtype=torch.float32, device="cpu")
            x = (1 - level) * x0 + level * eps
            v = model.ask(network, x, sigma, group).double()
            other = v if network is model.network else model.ask(model.network, x, sigma, group).double()
            rows["loss"].append((v - (eps - x0)).square().flatten(1).mean(1))
            rows["distance"].append((v - other).square().flatten(1).mean(1))
        for name, found in rows.items():
            parts[name].append(torch.stack(found, 1).cpu())
    return {name: torch.cat(found)[:total] for name, found in parts.items()}


def estimate_errors(loss: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the mean squared errors ``(N, L)`` of clean estimates."""
    return loss * torch.tensor(levels, dtype=loss.dtype, device=loss.device).square()

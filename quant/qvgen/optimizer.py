"""The optimiser of quantization-aware training, whose side branches are exchanged while it runs."""

from __future__ import annotations

import math

import torch
from torch import nn

from diffaccel.kernels.codes import LEAST_SCALE
from diffaccel.quant.qvgen.options import TrainedQuantization
from diffaccel.quant.qvgen.prepare import fake_layers

_GROUPS = {
    "weight_scale": "scales",
    "weight_zero": "scales",
    "act_logit": "clip",
    "side_left": "side",
    "side_right": "side",
}


def grouped(network: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters that are trained, by name, in groups: matrices, vectors, scales, side, clip."""
    fake = {name for name, _ in fake_layers(network)}
    groups: dict[str, dict[str, nn.Parameter]] = {n: {} for n in ("matrices", "vectors", "scales", "side", "clip")}
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        owner, _, last = name.rpartition(".")
        kind = _GROUPS.get(last) if owner in fake else None
        groups[kind or ("matrices" if p.dim() >= 2 else "vectors")][name] = p
    return groups


class QATOptimizer:
    """AdamW with betas (0.9, 0.95), and rates of their own for scales, side branches and clipping factors.

    All rates rise linearly over the warm-up and fall to 0 by a cosine. New side branches begin with empty moments.
    """

    def __init__(self, network: nn.Module, config: TrainedQuantization, fused: bool = False) -> None:
        self.network, self.config = network, config
        rates = {"scales": config.scale_lr, "side": config.rank_lr, "clip": config.clip_lr}
        self.peaks = {name: rates.get(name, config.lr) for name in grouped(network)}
        self.adam = torch.optim.AdamW(
            [
                {
                    "params": list(parameters.values()),
                    "weight_decay": config.weight_decay if name == "matrices" else 0.0,
                    "name": name,
                }
                for name, parameters in grouped(network).items()
            ],
            lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=fused,
        )  # fmt: skip

    def renew(self) -> None:
        """Take over the side branches that the network has now, and forget the moments of those that are gone."""
        groups = grouped(self.network)
        for group in self.adam.param_groups:
            now = list(groups[group["name"]].values())
            kept = {id(p) for p in now}
            for old in group["params"]:
                if id(old) not in kept:
                    self.adam.state.pop(old, None)
            group["params"] = now

    def step(self, step: int) -> None:
        """Update every parameter at a step's rates; scales stay positive."""
        share = rate_share(step, self.config)
        for group in self.adam.param_groups:
            group["lr"] = self.peaks[group["name"]] * share
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for _, layer in fake_layers(self.network):
                layer.weight_scale.clamp_min_(LEAST_SCALE)


def rate_share(step: int, config: TrainedQuantization) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine to 0."""
    warm = config.warmup * config.steps
    if step < warm:
        return (step + 1) / (math.floor(warm) + 1)
    part = (step - warm) / max(config.steps - warm, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))

"""Bytes of real architectures by their plans, counted on the meta device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

from diffaccel.quant import W4A8, W4A16, W8A8
from diffaccel.quant.plan import layers_of, plan


def share(network: Any, method: Any) -> float:
    """Bytes of all weights under a method, over those in 16 bits."""
    plain = after = 2 * sum(p.numel() for p in network.parameters())
    layers = plan(network, method)
    for name, _, _, module in layers_of(network):
        if name in layers:
            shapes = layers[name].shapes(module.out_features, module.in_features)
            after -= 2 * module.weight.numel()
            after += sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    return after / plain


@pytest.mark.slow
def test_flux_and_wan_at_8_and_4_bits() -> None:
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
        wan = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    assert len(plan(flux, W8A8())) == 19 * (12 + 2) + 38 * (5 + 1) + 1  # attention, MLPs, modulation, norm_out
    for method in (W8A8(), W8A8(dtype="fp8")):
        assert share(flux, method) < 0.52 and share(wan, method) < 0.52
    assert share(flux, W8A8(modulation="keep")) == pytest.approx(0.5 + 0.27 / 2, abs=0.01)
    assert share(flux, W4A16(modulation="int4")) < 0.27 and share(flux, W4A8()) < 0.33

"""Inception with random weights, for tests that need no trained network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from diffaccel.eval.networks.extractors.inception import InceptionNetwork


def save(path: Path) -> Path:
    """Save a state dict whose running statistics are those of noise, so that activations keep their scale."""
    torch.manual_seed(0)
    network = InceptionNetwork().train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    coarse = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        network.pool3(2 * nn.functional.interpolate(coarse, (299, 299), mode="bilinear") - 1)
    torch.save(network.state_dict(), path)
    return path

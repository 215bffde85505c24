"""A hash that tells whether a network is still the one that a run began with."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def weights_hash(network: nn.Module) -> str:
    """Return a hash of names, shapes, the first numbers and the sum of the bits of every weight."""
    digest = hashlib.sha256()
    for name, p in network.named_parameters():
        if p.is_meta:  # offloaded layer by layer
            digest.update(f"{name}{tuple(p.shape)}".encode())
            continue
        value = p.detach()
        bits = value.view(_BITS[value.element_size()]).sum(dtype=torch.int64)  # exact: in any order of the sum
        digest.update(f"{name}{tuple(p.shape)}{int(bits)}".encode())
        digest.update(value.reshape(-1)[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

"""Hashes that tell whether a network, or a whole pipeline, is still the one that a run began with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def weights_hash(network: nn.Module) -> str:
    """Return a hash of names, shapes, the first numbers and the sum of the bits of every weight."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
    digest = hashlib.sha256()
    for name, p in network.named_parameters():
        if p.is_meta:  # offloaded layer by layer
            digest.update(f"{name}{tuple(p.shape)}".encode())
            continue
        value = p.detach()
        bits = value.view(whole[value.element_size()]).sum(dtype=torch.int64)  # exact: in any order of the sum
        digest.update(f"{name}{tuple(p.shape)}{int(bits)}".encode())
        digest.update(value.reshape(-1)[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def pipeline_hash(pipe: Any) -> str:
    """Return a hash of what decides a pipeline's drawings beside its call: networks and the scheduler's settings."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__} ".encode())
        if isinstance(part, nn.Module):
            digest.update(weights_hash(part).encode())
    settings = dict(getattr(getattr(pipe, "scheduler", None), "config", {}))
    told = {key: value for key, value in settings.items() if not key.startswith("_")}  # versions, and sets in any order
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]

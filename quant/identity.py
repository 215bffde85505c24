"""A hash that tells whether a whole pipeline is still the one that a run began with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from diffaccel.modules.weights_hash import weights_hash


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

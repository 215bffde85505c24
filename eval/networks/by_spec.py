"""Build scorers and video networks from the specs of the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.video import FrameSampling
from diffaccel.eval.networks import scorers, weights
from diffaccel.eval.networks.extractors.base import exact_float32, frozen
from diffaccel.eval.networks.extractors.user import rows, source_sha256
from diffaccel.eval.networks.scorers import Scorer
from diffaccel.files import sha256


@dataclass(frozen=True)
class Network:
    """Feature network of videos.

    Attributes:
        name: name in the metric's key.
        function: uint8 ``(B, frames, 3, H, W)`` to ``(B, d)``.
        sampling: the frames it sees.
        weights_sha256: digest of its weights, or of its source.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    sampling: FrameSampling
    weights_sha256: str = ""


def scorer(spec: str, device: torch.device) -> Scorer:
    """Build the scorer of ``NAME``, ``NAME:FILE`` or ``py:module:function``.

    Raises:
        MissingWeights: if its weights are not found.
        DiffAccelError: for an unknown name, and for a function that cannot be imported.
    """
    if spec.startswith("py:"):
        return scorers.scorer(spec)
    name, _, path = spec.partition(":")
    return scorers.scorer(name, path or None, device=device)


def of_videos(spec: str, sampling: FrameSampling, device: torch.device) -> Network:
    """Build a network from uint8 ``(B, frames, 3, H, W)`` to ``(B, d)``, in float32 without TF32.

    Args:
        spec: ``torchscript:/path``, or ``py:module:callable``, whose import runs its code.
        sampling: the frames it sees.
        device: device of the network.

    Raises:
        MissingWeights: for a file that does not exist.
        DiffAccelError: for another spec, a file that is not TorchScript, and a name that cannot be imported.
    """
    kind, _, rest = spec.partition(":")
    if kind == "torchscript" and rest:
        file = weights.find(Path(rest).name, rest, flag="--fvd torchscript:/path")
        try:
            module = torch.jit.load(file, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise DiffAccelError(f"'{file}' is not a TorchScript file; save one with torch.jit.save.") from error
        sha = sha256(file)
        return Network(f"{file.stem}@{sha[:8]}", _exact(module, device), sampling, sha)
    if kind == "py" and rest:
        function, sha = _imported(rest)
        if isinstance(function, torch.nn.Module):
            frozen(function, device)
        return Network(f"{rest}@{sha[:8]}", _exact(function, device), sampling, sha)
    raise DiffAccelError(f"'{spec}' is no network of videos. Write torchscript:/path or py:module:function.")


def _exact(function: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Wrap a network: move clips to its device, compute in exact float32, and return feature rows."""

    def network(clips: Tensor) -> Tensor:
        with torch.no_grad(), exact_float32(device):
            return rows(function(clips.to(device))).float()

    return network


def _imported(target: str) -> tuple[Any, str]:
    """Import a callable; return it with its ``weights_sha256`` attribute, or else the sha256 of its source."""
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DiffAccelError(f"There is no callable '{target}' ({error}). Give py:module:function.") from error
    if not callable(function):
        raise DiffAccelError(f"'{target}' is not callable. Give py:module:function.")
    return function, getattr(function, "weights_sha256", "") or source_sha256(function)

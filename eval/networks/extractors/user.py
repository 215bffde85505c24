"""Extractors supplied by the user: a TorchScript file, or a Python callable named on the command line."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import weights
from diffaccel.eval.networks.extractors.base import Extractor, frozen
from diffaccel.files import sha256

_PROBE = (1, 3, 64, 64)
_OUTPUTS = ("pooler_output", "image_embeds")


def torchscript(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Extractor:
    """Load a scripted network from uint8 ``(B, 3, H, W)`` to ``(B, dim)``; ``return_features`` is set if accepted.

    Raises:
        MissingWeights: for a file that does not exist.
        DiffAccelError: for a file that is not TorchScript, or that returns no rows of features.
    """
    file = weights.find(os.path.basename(path), path, flag="torchscript:/path")
    device = torch.device(device)
    try:
        module = torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise DiffAccelError(f"'{file}' is not a TorchScript file; save one with torch.jit.save.") from error
    forward: Any = module.forward
    arguments = [argument.name for argument in forward.schema.arguments]
    options = {"return_features": True} if "return_features" in arguments else {}
    sha = sha256(file)

    def network(x: Tensor) -> Tensor:
        return rows(module(x, **options))

    return Extractor(
        name=file.stem, key=f"FD-{file.stem}@{sha[:8]}", dim=_dim(network, device, str(file)), weights_sha256=sha,
        official=False, device=device, module=module, network=network,
    )  # fmt: skip


def python(target: str, *, device: str | torch.device = "cpu") -> Extractor:
    """Import a callable ``module:name`` from uint8 ``(B, 3, H, W)`` to ``(B, dim)``. The import runs its code.

    Keys contain its ``weights_sha256`` attribute, if it has one, or else the digest of its source file.

    Raises:
        DiffAccelError: for a module or name that does not exist, and for a callable that returns no rows of features.
    """
    module, _, name = target.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, ValueError, AttributeError) as error:
        raise DiffAccelError(f"There is no callable '{target}' ({error}). Give py:module.path:callable.") from error
    if not callable(function):
        raise DiffAccelError(f"'{target}' is not callable. Give py:module.path:callable.")
    device = torch.device(device)
    if isinstance(function, nn.Module):
        frozen(function, device)
    sha = getattr(function, "weights_sha256", "") or source_sha256(function)

    def network(x: Tensor) -> Tensor:
        return rows(function(x))

    return Extractor(
        name=target, key=f"FD-{target}@{sha[:8]}", dim=_dim(network, device, target), weights_sha256=sha,
        official=False, device=device, module=function if isinstance(function, nn.Module) else None, network=network,
    )  # fmt: skip


def rows(output: Any) -> Tensor:
    """Return the features in a network's output: a tensor, the first of a tuple, or the pooled part of a model output.

    Since version 5, transformers' CLIP returns a model output where it used to return a tensor.

    Raises:
        DiffAccelError: for anything else.
    """
    if isinstance(output, Tensor):
        return output
    for name in _OUTPUTS:
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    if isinstance(output, list | tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise DiffAccelError(f"An extractor must return a tensor (B, dim); got {type(output).__name__}.")


def _dim(network: Callable[[Tensor], Tensor], device: torch.device, name: str) -> int:
    """Run a network on one black image, and return the number of features."""
    with torch.no_grad():
        features = network(torch.zeros(_PROBE, dtype=torch.uint8, device=device))
    if features.ndim != 2 or len(features) != 1:
        raise DiffAccelError(
            f"The extractor '{name}' returned shape {tuple(features.shape)} for uint8 images of shape {_PROBE}; "
            "expected (1, dim)."
        )
    return features.shape[1]


def source_sha256(function: Any) -> str:
    """Return the digest of a callable's source file, or of its ``repr`` where it has none."""
    try:
        file = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
        return sha256(Path(str(file)))
    except (OSError, TypeError):
        return hashlib.sha256(repr(function).encode()).hexdigest()

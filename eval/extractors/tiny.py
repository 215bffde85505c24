"""The embedded network as an extractor: always at hand, and its distances compare with nothing but themselves."""

from __future__ import annotations

import torch

from diffaccel.eval.extractors.base import Extractor, frozen
from diffaccel.eval.tiny_network import TinyNetwork, load_tiny, weights_sha256


def tiny(device: torch.device) -> Extractor:
    """:class:`~diffaccel.eval.tiny_network.TinyNetwork` with its packaged weights."""
    sha = weights_sha256()
    module = frozen(load_tiny(), device)
    return Extractor(
        name="tiny", key=f"FD-tiny@{sha[:8]}", dim=TinyNetwork.dim, weights_sha256=sha, official=False,
        network=module, device=device, module=module,
    )  # fmt: skip

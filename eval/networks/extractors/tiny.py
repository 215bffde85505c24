"""The extractor that ships with the package: small, and without a download."""

from __future__ import annotations

import torch

from diffaccel.eval.networks import tiny_network
from diffaccel.eval.networks.extractors.base import Extractor, frozen


def tiny(*, device: str | torch.device = "cpu") -> Extractor:
    """Build the embedded network. Its distance is called ``FD-tiny@<sha>`` and compares only with itself.

    Raises:
        DiffAccelError: for an installation without its weights.
    """
    device, sha = torch.device(device), tiny_network.weights_sha256()
    module = tiny_network.load_tiny()
    frozen(module, device)
    return Extractor(
        name="tiny", key=f"FD-tiny@{sha[:8]}", dim=module.dim, weights_sha256=sha, official=False, device=device,
        module=module, network=module,
    )  # fmt: skip

"""Normal noise from a caller's generators, as diffusers draws it, without waiting for a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError


def noise_like(x: Tensor, generator: Any) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of ``x``.

    Args:
        generator: a generator, None for torch's own, or a list of which row i uses the i-th. Noise is drawn on the
            generator's device: what comes from a CPU gives the same numbers for a picture on any device.

    Raises:
        DiffAccelError: for a list of another length than ``x``.
    """
    from diffusers.utils.torch_utils import randn_tensor

    several = generator if isinstance(generator, list) else [generator]
    if isinstance(generator, list) and len(generator) != len(x):
        raise DiffAccelError(
            f"Noise for {len(x)} rows was asked of {len(generator)} generators. Pass one, or one per row."
        )
    if x.device.type == "cuda" and several[0] is not None and several[0].device.type == "cpu":
        drawn = randn_tensor(tuple(x.shape), generator=generator, dtype=x.dtype)
        return drawn.pin_memory().to(x.device, non_blocking=True)  # a plain copy waits for all that is queued
    return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)

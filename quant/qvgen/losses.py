"""The losses of quantization-aware training: the teacher's prediction, and by noise level the data's own target."""

from __future__ import annotations

import torch
from torch import Tensor


def teacher_share(u: Tensor, alpha: float) -> Tensor:
    """Return ``(e^(alpha (1 - u)) - 1) / (e^alpha - 1)`` for ``u = 1 - sigma``; ``1 - u`` for an alpha of 0.

    It is 1 at noise and 0 at data.
    """
    if alpha == 0:
        return 1 - u
    return torch.expm1(alpha * (1 - u)) / torch.expm1(torch.tensor(alpha, dtype=u.dtype, device=u.device))


def per_sample(difference: Tensor) -> Tensor:
    """Return the mean square of every sample, ``(B,)``."""
    return difference.float().square().flatten(1).mean(dim=1)


def training_loss(student: Tensor, teacher: Tensor, target: Tensor | None, share: Tensor | None) -> Tensor:
    """Return ``mean_B [share |student - teacher|^2 + (1 - share) |student - target|^2]``.

    Args:
        share: of the teacher, ``(B,)``; None for all.
        target: the output of the network that knew data and noise; needed beside a share.
    """
    followed = per_sample(student - teacher)
    if share is None or target is None:
        return followed.mean()
    return (share * followed + (1 - share) * per_sample(student - target)).mean()

"""The orthonormal discrete cosine transform as a matrix: two small products transform a picture."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def dct_matrix(n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the DCT-II matrix ``(n, n)``, a row a frequency; ``C C' = 1``."""
    place = (torch.arange(n, device=device, dtype=torch.float64) + 0.5) / n
    rows = torch.cos(math.pi * torch.arange(n, device=device, dtype=torch.float64)[:, None] * place)
    rows *= math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.to(dtype)

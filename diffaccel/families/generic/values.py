"""Comparing and copying the arguments that a pipeline passes to its network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scalar(time: Any, rows: int) -> Tensor | None:
    """Return the value of a time argument, given once or the same for every row; None for any other argument."""
    if isinstance(time, bool | int | float):
        dtype = torch.float32 if isinstance(time, float) else None
        return torch.tensor(time, dtype=dtype, device="cpu")
    if not isinstance(time, Tensor) or time.shape not in ((), (rows,)) or bool((time != time.reshape(-1)[0]).any()):
        return None
    return time.reshape(-1)[0]


def frozen(value: Any) -> Any:
    """Copy a value so that later in-place changes do not affect the copy."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: frozen(v) for k, v in value.items()}
    return type(value)([frozen(v) for v in value]) if type(value) in (list, tuple) else value


def same(a: Any, b: Any) -> bool:
    """Return whether two arguments are equal, tensors to the bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)


def rounded(returned: Tensor, sample: Tensor) -> bool:
    """Return whether ``sample`` is what the step returned, up to a cast that some loops make in between."""
    casts = (returned, returned.bfloat16(), returned.half())
    return any(torch.equal(cast.to(sample.dtype), sample) for cast in casts)


def pictures(value: Any) -> bool:
    """Return whether a network argument may be latents: a batch, or one tensor per picture."""
    items = value if isinstance(value, list | tuple) else [value]
    return bool(items) and all(isinstance(v, Tensor) and v.ndim >= 3 and v.is_floating_point() for v in items)

"""What every training run does alike in a step: stop together, average gradients, pass over bad ones, write its log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffaccel.errors import DiffAccelError
from diffaccel.training.shards import local

BAD_STEPS = 50  # without a finite gradient in a row, after which a run ends

# cuDNN's attention, PyTorch's first choice on Hopper, is left out: its gradients of a FLUX transformer under autocast
# were hundreds of times too large or not finite where other kernels agreed (torch 2.11, H200, bfloat16)
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Compute attention in the block by kernels with right gradients; precisions are left as they are."""
    with sdpa_kernel(_KERNELS):
        yield


@contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute networks in ``dtype`` in the block (float32: as they are), by attention kernels with right gradients.

    This is the one place that switches autocast on: whatever trains computes in this block.
    """
    with differentiable_attention(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def backward(loss: Tensor) -> None:
    """Add the gradients of a scalar; activations that are computed again on the way meet the kernels of their first."""
    with differentiable_attention():
        loss.backward()


def is_over_for_all(over: bool, size: int, device: torch.device) -> bool:
    """Return what the first of ``size`` processes says: the others, which wait for it at every step, stop with it."""
    if size == 1:
        return over
    told = torch.tensor(over, dtype=torch.uint8, device=device)
    torch.distributed.broadcast(told, 0)
    return bool(told)


def average_gradients(parameters: Sequence[nn.Parameter], size: int) -> None:
    """Average the gradients of ``size`` processes, in one piece."""
    if size == 1:
        return
    with_gradient = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.reshape(-1) for p in with_gradient if p.grad is not None])
    torch.distributed.all_reduce(flat)
    flat /= size
    for p, part in zip(with_gradient, flat.split([p.numel() for p in with_gradient]), strict=True):
        p.grad = part.view_as(p)


def clip_or_zero(parameters: Sequence[nn.Parameter], largest: float) -> tuple[Tensor, Tensor]:
    """Clip the norm of a gradient, and make one that is not finite zero; return the norm, and whether it is finite.

    Selecting on the device keeps its queue full; asking on the host whether the norm is finite would drain it.
    """
    if any(hasattr(p, "to_local") for p in parameters):
        norm = _clip_shared(parameters, largest)
    else:
        norm = nn.utils.clip_grad_norm_(parameters, largest)
    finite = torch.isfinite(norm)
    for gradient in [local(p.grad) for p in parameters if p.grad is not None]:
        torch.where(finite, gradient, torch.zeros_like(gradient), out=gradient)
    return norm.detach(), finite


def _clip_shared(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Clip the norm of gradients of which each process has a part; return the norm, the same in all of them."""
    parts = [local(p.grad) for p in parameters if p.grad is not None]
    square = torch.stack([part.float().square().sum() for part in parts]).sum()
    torch.distributed.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def nothing_learnt(steps: int, checkpoint: Path, advice: str) -> DiffAccelError:
    """Return the error of a run whose last ``steps`` gradients were not finite.

    Args:
        checkpoint: of the run; it is told whether there is one.
        advice: what to take beside another folder.
    """
    kept = f"The checkpoint before them is kept in '{checkpoint}'" if checkpoint.exists() else ""
    return DiffAccelError(
        f"The last {steps} gradients were not finite, so that nothing is learnt any more. "
        f"{kept or 'There is no checkpoint from before them'}; take another folder with {advice}."
    )


def write_entry(folder: Path, entry: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Append an entry of numbers to ``log.jsonl``, null for one that is not finite, and tell it as text."""
    append_entry(folder / "log.jsonl", entry)
    tell(" ".join(f"{key}={value}" for key, value in entry.items()))


def append_entry(file: Path, entry: dict[str, Any]) -> None:
    """Append numbers as a line of JSON, null for one that is not finite; a line that was cut off is ended first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({k: v if math.isfinite(v) else None for k, v in entry.items()}) + "\n"
    with open(file, "ab+") as opened:
        if opened.tell():
            opened.seek(-1, 2)
            line = line if opened.read() == b"\n" else "\n" + line
        opened.write(line.encode())

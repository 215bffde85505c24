"""Which form of an operation runs: its Triton kernel ("fused"), its plain PyTorch formula ("reference"), or "auto"."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import _C as bindings

Mode = Literal["auto", "fused", "reference"]
MODES = ("auto", "fused", "reference")

logger = logging.getLogger(__name__)


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, such as (9, 0); (0, 0) for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@functools.cache
def tell_once(sentence: str) -> None:
    """Log a warning, once for each sentence."""
    logger.warning(sentence)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a graph is traced for one device
def is_fused(mode: Mode, device: torch.device, operation: str, least: tuple[int, int] = (8, 0)) -> bool:
    """Return whether an operation runs as its kernel.

    On a CUDA device that cannot run it, "auto" takes the reference and logs that once.

    Args:
        operation: its name, for messages.
        least: the smallest compute capability that the kernel runs on.

    Raises:
        ValueError: for an unknown mode, and for "fused" on a device that cannot run the kernel.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}.")
    if mode == "reference":
        return False
    if device.type == "cuda" and has_triton() and capability(device) >= least:
        return True
    needs = f"a CUDA device of compute capability {least[0]}.{least[1]} or more, and Triton"
    if mode == "fused":
        raise ValueError(f"{operation} cannot run fused on {device}: it needs {needs}. Use mode='reference' or 'auto'.")
    if device.type == "cuda":
        tell_once(f"{operation} runs as its slow reference on {device}: the kernel needs {needs}.")
    return False


def is_direct(*tensors: torch.Tensor) -> bool:
    """Return whether a kernel may be launched without torch's dispatcher, which costs the host more than the launch.

    Not while anything is traced or compiled, under a mode that watches operations (counters of FLOPs, fake tensors),
    for subclasses of tensors, and where gradients are recorded.
    """
    if (
        torch.compiler.is_compiling()
        or bindings._len_torch_dispatch_stack()
        or bindings._get_tracing_state() is not None
    ):
        return False
    records = torch.is_grad_enabled()
    return all(type(x) in _PLAIN and not (records and x.requires_grad) for x in tensors)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return the context in which Triton launches on the device of ``x``, which need not be the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


_HERE = contextlib.nullcontext()


def count_of(length: int, size: int) -> int:
    """Return how many tiles of a size cover a length. Triton's own function of it takes longer than a launch."""
    return -(-length // size)


def power_above(number: int) -> int:
    """Return the least power of two that is not below a number of 1 or more."""
    return 1 << (number - 1).bit_length()

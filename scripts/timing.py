"""What benches time alike: a queue of calls, with one wait for the device at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], repeats: int, device: torch.device | None = None) -> float:
    """Return the milliseconds of a call in a queue of calls, after three; without a device, on CUDA if there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(3):
        function()
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait(device)
    return 1000 * (time.perf_counter() - start) / repeats

"""What benches time alike: a queue of calls, with one wait for the device at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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


def in_turns(
    calls: Mapping[str, Callable[[], Any]], turns: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Return the seconds of every call in each of ``turns`` rounds of all of them, after one that warms up.

    Every other round goes backwards, so that none always follows the same one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            wait(device)
            start = time.perf_counter()
            calls[name]()
            wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds

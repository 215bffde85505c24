"""A stand-in for CUDA graphs on the CPU: a replay calls the function again, on the same fixed inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from diffaccel.modules.capture.arguments import map_result, tensors_of
from diffaccel.modules.capture.graphs import BACKENDS


class ReplayedCall:
    """Calls a function again and writes what it returns where its first result lies, as a graph does."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.result = map_result(function(), torch.clone)
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self.result))

    def replay(self) -> None:
        for target, value in zip(tensors_of(self.result), tensors_of(self.function()), strict=True):
            target.copy_(value)


class ReplayedCalls:
    """The backend; counts recordings, and fails where ``fails`` says so."""

    fails: type[BaseException] | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_pool(self) -> object:
        return object()

    def warm_up(self, function: Callable[[], Any]) -> None:
        function()

    def record(self, function: Callable[[], Any], pool: Any) -> tuple[ReplayedCall, Any]:
        if self.fails is not None:
            raise self.fails("a recording that fails on purpose")
        call = ReplayedCall(function)
        return call, call.result

    def stream(self) -> None:
        return None

    def wait(self, stream: Any) -> None:
        raise AssertionError("there is one stream only")

    def memory(self) -> int:
        return 2**40


@pytest.fixture
def replayed_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ReplayedCalls]]:
    """Let networks on the CPU be captured."""
    monkeypatch.setitem(BACKENDS, "cpu", ReplayedCalls)
    monkeypatch.setattr(ReplayedCalls, "fails", None)
    yield ReplayedCalls

"""Temporal tables on a GPU: bits, waiting, memory, and graphs."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
from torch import Tensor

import diffaccel
from diffaccel.modules import Capture
from diffaccel.quant import TIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def told(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).reports["tib"]["tables"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_images_to_the_bit(family: str, captured: bool, dtype: torch.dtype) -> None:
    case = matrix.Case(family, TIB(), "cuda")
    pipe = case.make().to(dtype)
    calls: list[dict[str, Any]] = [{}, {"steps": 3}, {"batch": 1}, {}, {"steps": 3}, {}]
    expected = [case.call(pipe, **call) for call in calls]
    case.wrap(pipe)
    if captured:
        diffaccel.accelerate(pipe, Capture())
    for call, value in zip(calls, expected, strict=True):
        assert torch.equal(case.call(pipe, **call), value)
    assert told(pipe)["answered"] > 0 and told(pipe)["host_bytes"] > 0
    assert torch.equal(case.call(diffaccel.remove(pipe)), expected[0])


@pytest.mark.parametrize("family", ["flux", "dit", "wan5b", "sdxl"])
def test_steps_of_a_known_schedule_wait_for_nothing(family: str) -> None:
    case = matrix.Case(family, TIB(), "cuda")
    pipe = case.wrap(case.make())
    for _ in range(2):
        case.call(pipe)
    network, errors = case.network(pipe), list[str]()
    calls = 0

    owner = vars(network)["_diffaccel_temporal"].owner
    fill = owner._fill

    def watched(kind: Any, call: Any) -> None:
        nonlocal calls
        calls += 1
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if calls > 2 else "default")  # conditions are read in the first calls
        try:
            fill(kind, call)
        except RuntimeError as error:
            errors.append(str(error))
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")

    owner._fill = watched
    try:
        case.call(pipe)
    finally:
        del owner._fill
    assert calls >= 4 and not errors


def test_weights_leave_the_device_and_come_back() -> None:
    case = matrix.Case("sd3", TIB(), "cuda")
    pipe = case.make()
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated()
    case.call(case.wrap(pipe))
    away = told(pipe)["host_bytes"]
    assert away > 0 and torch.cuda.memory_allocated() < resident + told(pipe)["table_bytes"] + 2**20
    diffaccel.remove(pipe)
    after: dict[str, Tensor] = dict(pipe.transformer.named_parameters())
    assert all(p.device.type == "cuda" and torch.equal(p, before[name]) for name, p in after.items())


def test_a_new_prompt_under_capture() -> None:
    case = matrix.Case("flux", TIB(), "cuda")
    plain = case.make()
    pipe = diffaccel.accelerate(case.make(), TIB(), Capture())
    for prompt in (["a dog", "a tree"], ["a cup", "a hat"], ["a dog", "a tree"], ["a cow", "a key"]):
        extra = {"prompt": prompt}
        assert torch.equal(case.call(pipe, extra=extra), case.call(plain, extra=extra))

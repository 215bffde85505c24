"""Pipelines without a family on a CUDA device: parity, offloading, and what identifying them costs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_others as others
import torch

import diffaccel
from diffaccel.runtime import stock_loop
from diffaccel.samplers import Euler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = [name for name in others.NAMES if name != "qwen"]  # whose guidance only its own loop follows


@pytest.fixture(autouse=True)
def native_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_loop, "generate_stock", None)


def _to_cuda(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_cuda(v) for v in value]
    return value.cuda() if torch.is_tensor(value) else value


def run(pipe: Any, name: str) -> torch.Tensor:
    return others.latents_of(pipe(**{k: _to_cuda(v) for k, v in others.call_kwargs(name).items()}))


@pytest.mark.parametrize("name", NAMES)
def test_euler_equals_the_stock_call(name: str) -> None:
    pipe = others.make(name).to("cuda")
    before = run(pipe, name)
    diffaccel.accelerate(pipe, Euler(state="stock"))
    assert torch.equal(run(pipe, name), before)


@pytest.mark.parametrize("name", ["chroma", "aura_flow", "ltx"])
def test_model_offloading(name: str) -> None:
    """AuraFlow's loop cannot be interrupted, so that stand-ins stay in it until its last step."""
    pipe = others.make(name)
    pipe.enable_model_cpu_offload()
    before = run(pipe, name)
    diffaccel.accelerate(pipe, Euler(state="stock"))
    for _ in range(2):
        assert torch.equal(run(pipe, name), before)
        assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}


def test_identifying_keeps_the_devices_random_state() -> None:
    pipe = others.make("chroma").to("cuda")
    kwargs = {**others.call_kwargs("chroma"), "generator": None}
    torch.manual_seed(3)
    before = others.latents_of(pipe(**kwargs))
    diffaccel.accelerate(pipe, Euler(state="stock"))
    torch.manual_seed(3)
    assert torch.equal(others.latents_of(pipe(**kwargs)), before)

"""Torch's default dtype and default device do not leak into a wrapped call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

import diffaccel
from diffaccel import schedules
from diffaccel.modules.stand_in import random_like
from diffaccel.samplers import BoN, Euler, Heun, Scheduler

FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip
ROOT = Path(__file__).parents[2]
ROOMS = ("diffaccel/families", "diffaccel/modules", "diffaccel/runtime", "samplers")
FILES = ("diffaccel/flow.py", "diffaccel/schedules.py", "diffaccel/session.py")


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def _brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def prepared(name: str) -> tuple:
    """Return a pipeline and its call with the text encoded, since text encoders follow the default dtype."""
    pipe = tiny.make(name)
    call = tiny.call_kwargs(name, batch=1)
    prompt, negative = call.pop("prompt"), call.pop("negative_prompt", None)
    embeds = pipe.encode_prompt(prompt, "cpu", 1, True, negative)
    return pipe, {**call, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}


@pytest.mark.parametrize("sampler", [Euler(state="stock"), Scheduler()], ids=lambda sampler: sampler.name)
def test_a_guided_call_equals_the_stock_call(sampler, default_dtype: torch.dtype) -> None:
    pipe, call = prepared("sd")
    images = []
    for wrapped in (False, True):
        if wrapped:
            diffaccel.accelerate(pipe, sampler)
        torch.set_default_dtype(default_dtype)
        images.append(pipe(**{**call, "generator": torch.Generator().manual_seed(0)}).images)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(*images)


@pytest.mark.parametrize("sampler", [Heun(), BoN(reward=_brightness, budget=8)], ids=["heun", "bon"])
def test_a_sampler_computes_the_same(sampler, default_dtype: torch.dtype) -> None:
    pipe, call = prepared("sd")
    diffaccel.accelerate(pipe, sampler)
    images = []
    for dtype in (torch.float32, default_dtype):
        torch.set_default_dtype(dtype)
        images.append(pipe(**{**call, "generator": torch.Generator().manual_seed(0)}).images)
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)


def test_a_default_device_is_not_used() -> None:
    scheduler = tiny.make("sd").scheduler
    scheduler.set_timesteps(4)
    expected, drawn = schedules.read(scheduler, 999).sigmas, random_like(torch.zeros(1), (2, 3), 1)
    with torch.device("meta"):
        assert torch.equal(schedules.read(scheduler, 999).sigmas, expected)
        assert torch.equal(random_like(torch.zeros(1, device="cpu"), (2, 3), 1), drawn)


def test_a_timestep_is_found_exactly_at_a_coarse_default_dtype(default_dtype: torch.dtype) -> None:
    scheduler = tiny.ddim()
    scheduler.set_timesteps(500)  # neighbours are equal in bfloat16
    torch.set_default_dtype(default_dtype)
    assert schedules.start_index(scheduler, float(scheduler.timesteps[3])) == 3


def test_every_new_tensor_names_its_dtype_and_device() -> None:
    files = [ROOT / name for name in FILES] + [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _is_factory(node.func)
        if not _needed(node) <= {keyword.arg for keyword in node.keywords}
    ]
    assert not missing, f"name dtype and device, which torch's defaults decide otherwise: {missing}"


def _is_factory(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and function.attr in FACTORIES
        and isinstance(function.value, ast.Name)
        and function.value.id == "torch"
    )


def _needed(node: ast.Call) -> set[str]:
    """Return the keywords that a factory needs; ``as_tensor`` keeps the dtype of an array."""
    assert isinstance(node.func, ast.Attribute)
    return {"device"} if node.func.attr == "as_tensor" else {"dtype", "device"}

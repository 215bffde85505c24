"""A sampler calls the network as the pipeline does: the same arguments by position, the same shape of the time."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_more
import tiny_others
import torch
from diffusers import DDIMPipeline

import diffaccel
from diffaccel.samplers import Euler, Scheduler, TaylorSeer

ROOMS = [
    *((tiny, name) for name in tiny.FAMILIES),
    *((tiny_more, n) for n in ("wan", "hunyuan", "cogvideox", "dit", "ddim")),
]
ROOMS += [(tiny_others, name) for name in ("sana", "ltx", "z_image")]


def shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)


def calls(room: Any, name: str, sampler: Any) -> list[Any]:
    """Return how a call evaluates its network: shapes of arguments by position, and those by name."""
    pipe, seen = room.make(name), []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def look(module, args, kwargs):
        seen.append(([shape(value) for value in args], {k: shape(v) for k, v in kwargs.items() if v is not None}))

    network.register_forward_pre_hook(look, with_kwargs=True)
    if sampler is not None:
        diffaccel.accelerate(pipe, sampler)
    pipe(**room.call_kwargs(name))
    return seen


@pytest.mark.parametrize("sampler", [Euler(state="stock"), Scheduler()], ids=lambda sampler: sampler.name)
@pytest.mark.parametrize(("room", "name"), ROOMS, ids=[name for _, name in ROOMS])
def test_calls_are_the_pipelines_own(room: Any, name: str, sampler: Any) -> None:
    if (name, sampler.name) == ("ddim", "euler"):
        pytest.skip("its scheduler clips samples, which no other sampler follows")
    stock, wrapped = calls(room, name, None), calls(room, name, sampler)
    assert [args for args, _ in wrapped] == [args for args, _ in stock]
    assert [kwargs.get("timestep") for _, kwargs in wrapped] == [kwargs.get("timestep") for _, kwargs in stock]
    assert [set(kwargs) for _, kwargs in wrapped] == [set(kwargs) for _, kwargs in stock]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_hook_that_reads_sample_and_time_by_position(name: str) -> None:
    times: list[list[float]] = []
    for sampler in (None, Euler(), Scheduler()):
        pipe = tiny.make(name)
        times.append([])
        pipe.unet.register_forward_pre_hook(lambda _, args: times[-1].append(args[1].item() + 0 * len(args[0])))
        if sampler is not None:
            diffaccel.accelerate(pipe, sampler)
        pipe(**tiny.call_kwargs(name))
    assert times[0] == times[1] == times[2] and len(times[0]) == 4


@pytest.mark.parametrize("method", [Scheduler(), TaylorSeer(interval=2)], ids=lambda method: method.name)
def test_a_hook_that_reads_the_output_by_name(method: Any) -> None:
    """DDIM's own network is called without ``return_dict``: what it returns has a ``sample``, under a cache too."""
    outputs: list[list[torch.Tensor]] = []
    for wrap in (False, True):
        pipe = tiny_more.make("ddim", clip_sample=False)
        outputs.append([])
        if wrap:
            diffaccel.accelerate(pipe, method)
        pipe.unet.register_forward_hook(lambda _, args, output: outputs[-1].append(output.sample))
        pipe(**tiny_more.call_kwargs("ddim"))
    stock, wrapped = outputs
    assert torch.equal(stock[0], wrapped[0]) and stock[-1].shape == wrapped[-1].shape


def test_a_loop_that_takes_the_networks_first_value() -> None:
    class ByIndex(DDIMPipeline):
        def __call__(self, num_inference_steps: int = 4, generator: Any = None) -> torch.Tensor:
            x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float32, device="cpu")
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t)[0], t, x)[0]
            return x

    pipe = ByIndex(**tiny_more.make("ddim").components)
    before = pipe(generator=torch.Generator().manual_seed(0))
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(0)), before)

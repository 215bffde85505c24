"""A call that is interrupted at any line leaves the pipeline as it was, for the next call and after ``remove``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor

import diffaccel
from diffaccel import compose
from diffaccel.families.generic import stand_ins, watching
from diffaccel.modules import guard
from diffaccel.runs import profile
from diffaccel.runtime import call as runtime_call
from diffaccel.runtime import interception, probe, stock_loop
from diffaccel.samplers import Euler
from tests.support.interrupts import Interrupted, interrupt, visits

NATIVE = [compose, guard, runtime_call, probe, interception, stand_ins, watching, contextlib]
STOCK = [compose, guard, runtime_call, stand_ins, watching, stock_loop, contextlib]


class Net(ModelMixin, ConfigMixin):
    """One product: calls of it take no time."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 4).reshape(4, 1, 1))

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = True) -> Any:
        time = torch.as_tensor(timestep).float().reshape(-1, 1, 1, 1) / 1000
        output = sample * self.weight * time + encoder_hidden_states[:, :, None, None]
        return (output,)


class Small(DiffusionPipeline):
    """A text pipeline of no family, which the native driver can follow."""

    drift = 0.0

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return torch.full((1, 4), float(len(prompt)))

    @torch.no_grad()
    def __call__(
        self, prompt: str = "", num_inference_steps: int = 3, generator: Any = None, output_type: str = "latent",
        return_dict: bool = True,
    ) -> Any:  # fmt: skip
        text = self.encode_prompt(prompt)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = randn_tensor((1, 4, 2, 2), generator=generator) * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            network_input = self.scheduler.scale_model_input(latents, t)
            output = self.unet(network_input, t, encoder_hidden_states=text, return_dict=False)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            latents = latents + self.drift
        return (latents,)


class Drifting(Small):
    """A pipeline that changes latents between its steps, so that samplers run in its own loop."""

    drift = 0.25


def make(cls: type[Small]) -> Small:
    pipe = cls(Net(), EulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(pipe: Any) -> torch.Tensor:
    return pipe("a cat", generator=seeded())[0]


def profiled(pipe: Any) -> torch.Tensor:
    def measure() -> torch.Tensor:
        with profile.measure(pipe):
            return draw(pipe)

    return guard.alone(pipe, measure)


CASES = pytest.mark.parametrize(
    ("cls", "modules", "call"),
    [(Small, NATIVE, draw), (Drifting, STOCK, draw), (Small, [profile, guard], profiled)],
    ids=["native", "stock_loop", "profile"],
)


def check_lines(cls: type[Small], modules: list, call: Callable[[Any], torch.Tensor], every: int) -> None:
    """Interrupt ``call`` at every so many lines of ``modules``, and call the pipeline again each time."""
    stock = draw(make(cls))
    pipe = diffaccel.accelerate(make(cls), Euler())
    wrapped = draw(pipe)
    kept_alive = []  # with their frames
    lines = visits(modules, lambda: call(pipe))
    assert len(lines) > 40
    for line in lines[::every]:
        kept_alive.append(interrupt(modules, line, lambda: call(pipe)))
        assert isinstance(kept_alive[-1], Interrupted), line
        assert torch.equal(draw(pipe), wrapped), line
        assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks, line
        kept_alive.append(interrupt(modules, line, lambda: call(pipe)))
        diffaccel.remove(pipe)
        assert type(pipe) is cls and torch.equal(draw(pipe), stock), line
        diffaccel.accelerate(pipe, Euler())


@CASES
def test_an_interrupt_leaves_nothing(cls: Any, modules: list, call: Any) -> None:
    check_lines(cls, modules, call, every=53)


@pytest.mark.slow
@CASES
def test_an_interrupt_at_any_line_leaves_nothing(cls: Any, modules: list, call: Any) -> None:
    check_lines(cls, modules, call, every=1)


@pytest.mark.parametrize("cls", [Small, Drifting])
def test_calls_of_two_threads_wait_for_each_other(cls: type[Small]) -> None:
    pipe = diffaccel.accelerate(make(cls), Euler())
    other = diffaccel.accelerate(cls(pipe.unet, pipe.scheduler), Euler())  # shares the scheduler
    other.set_progress_bar_config(disable=True)
    wanted, drawn = draw(pipe), []
    threads = [
        threading.Thread(target=lambda p=p: drawn.extend(draw(p) for _ in range(5))) for p in (pipe, pipe, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(drawn) == 15 and all(torch.equal(picture, wanted) for picture in drawn)


def test_remove_waits_for_a_call_and_a_call_that_waited_is_then_the_stock_call() -> None:
    pipe = diffaccel.accelerate(make(Small), Euler())
    stock, entered, leave, drawn = draw(make(Small)), threading.Event(), threading.Event(), []

    def hold() -> None:
        entered.set()
        leave.wait(60)

    first = threading.Thread(target=lambda: guard.alone(pipe, hold))
    first.start()
    entered.wait(60)
    others = [threading.Thread(target=diffaccel.remove, args=(pipe,))]
    others.append(
        threading.Thread(target=lambda call=pipe.__call__: drawn.append(call("a cat", generator=seeded())[0]))
    )
    for thread in others:
        thread.start()
    assert diffaccel.summary(pipe).methods and not drawn
    leave.set()
    for thread in (first, *others):
        thread.join(60)
    assert type(pipe) is Small and len(drawn) == 1
    assert torch.equal(draw(pipe), stock)


def test_a_call_within_a_call_passes() -> None:
    pipe = diffaccel.accelerate(make(Small), Euler())
    wanted = draw(pipe)
    assert torch.equal(guard.alone(pipe, lambda: draw(pipe)), wanted)

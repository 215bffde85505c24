"""The fallback driver: a sampler inside a stock loop, for a pipeline that no family describes.

The stock loop calls its network once per entry of ``scheduler.timesteps`` and then ``scheduler.step``. Here the entries
are the noise levels at which the sampler will ask, found by rehearsing it on one number, and ``step`` hands the guided
output to the sampler and returns where it wants to look next. One guided prediction at a time, at the call's own batch
and resolution: anything else raises :class:`UnsupportedBySampler`.

Whatever else the loop does goes on as ever: a ControlNet answers at every entry, and inpainting mixes the latents with
the noised original after every step, which the sampler receives as the user's edit. Where a pipeline cuts the entries
(``strength`` of image-to-image) the sampler starts at the level that is first stepped from.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel import schedules
from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.families import FAMILIES
from diffaccel.flow import VE_PATH
from diffaccel.runtime.native import Stats
from diffaccel.schedules import Schedule
from diffaccel.session import Eval, Pred, Sampling, Step, bcast


class StockSession:
    """The part of a session that a stock loop can give: where to start, the noise levels, and noise."""

    def __init__(self, pipe: Any, schedule: Schedule, x: Tensor, generator: Any) -> None:
        self.schedule, self.x, self.generator = schedule, x, generator
        self._pipeline = type(pipe).__name__

    @property
    def sigmas(self) -> Tensor:
        return self.schedule.sigmas

    @property
    def path(self) -> Any:
        return self.schedule.path

    def randn_like(self, x: Tensor) -> Tensor:
        """Noise from the caller's generator, as a full session draws it."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(tuple(x.shape), generator=self.generator, device=x.device, dtype=x.dtype)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedBySampler(
            f"The sampler needs the session's '{name}', which needs a pipeline family; {self._pipeline} has none. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )


def rehearse(config: SamplerConfig, pipe: Any, schedule: Schedule) -> list[Tensor]:
    """The noise levels at which a sampler will ask for predictions, in order."""
    x = torch.zeros(1, 1, 1, 1)
    sampling = config.sample(StockSession(pipe, schedule, x, torch.Generator()))  # type: ignore[arg-type]
    asked: list[Tensor] = []
    reply: Any = None
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration:
            return asked
        if isinstance(event, Step):
            reply = event.x
        else:
            _check_single(event, config, pipe)
            asked.append(event.sigma)  # type: ignore[union-attr]
            reply = Pred(schedule.path, event.x, event.sigma, torch.zeros_like(x))  # type: ignore[union-attr]


class _Loop:
    """``scheduler.step`` of one call: feeds the sampler and remembers what the network will see next."""

    def __init__(self, pipe: Any, config: SamplerConfig, generator: Any) -> None:
        self.pipe, self.config, self.generator = pipe, config, generator
        self.stats = Stats()
        self.schedule: Schedule | None = None
        self.asked: list[Tensor] = []
        self.own_entries = False  # the entries are the scheduler's own, so that a place means the same in both
        self.start: int | None = None  # place of the first entry that the loop visits
        self.sampling: Sampling | None = None
        self.event: Any = None
        self.returned: Tensor | None = None

    def begin(self, scheduler: Any) -> None:
        """After the pipeline set its timesteps: replace them by the sampler's."""
        self.schedule = schedules.read(scheduler)
        self.asked = rehearse(self.config, self.pipe, self.schedule)
        own, self.start = scheduler.timesteps, None
        scheduler.timesteps = torch.stack([self.schedule.timestep(s) for s in self.asked])
        self.own_entries = _same(scheduler.timesteps, own)
        self.pipe._num_timesteps = len(self.asked)

    def enter(self, scheduler: Any, timestep: Any) -> Schedule:
        """The schedule from where the loop stands when it first asks; samplers do not see what came before."""
        if self.schedule is None:
            raise DiffAccelError(f"{type(self.pipe).__name__} stepped its scheduler before setting timesteps.")
        if self.start is None:
            self.start = schedules.begin(scheduler, timestep)
            if self.start:
                self.schedule, whole = self.schedule.since(self.start), self.asked
                self.asked = rehearse(self.config, self.pipe, self.schedule) if self.own_entries else []
                if self.asked != whole[self.start :]:
                    raise self.cannot_cut(scheduler)
        return self.schedule

    def cannot_cut(self, scheduler: Any) -> UnsupportedBySampler:
        return UnsupportedBySampler(
            f"{type(self.pipe).__name__} leaves out the first steps of {type(scheduler).__name__} (`strength` or "
            f"`denoising_start`), which '{self.config.name}' cannot follow here: it does not ask once per timestep of "
            "that scheduler. Use strength=1.0, or a sampler with one prediction a step ('euler', 'dpmpp2m') with a "
            "pipe.scheduler of order 1 (EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler)."
        )

    def input_at(self, scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
        """``scale_model_input``: the network's input from the pipeline's latents at the current noise level."""
        if self.schedule is None or self.schedule.path is not VE_PATH:
            return sample  # pipeline latents are the network's input already
        schedule = self.enter(scheduler, timestep)
        return schedule.network_input(sample, self.asked[min(self.stats.calls, len(self.asked) - 1)])

    def place(self, scheduler: Any, given: list[Any]) -> None:
        """Before the pipeline noises something: inside its loop index schedulers do that at their own step index."""
        if self.sampling is None:
            if any(isinstance(value, Tensor) and not value.numel() for value in given):
                raise self.cannot_cut(scheduler)  # cut to nothing
            return
        indexed = hasattr(scheduler, "_step_index")
        needs_own = indexed or scheduler.timesteps.is_floating_point()  # others index a table by whole timesteps
        if not isinstance(self.event, Step) or (needs_own and not self.own_entries):
            raise self.cannot_mix()
        if indexed:
            scheduler._step_index = (self.start or 0) + self.stats.calls

    def cannot_mix(self) -> UnsupportedBySampler:
        return UnsupportedBySampler(
            f"{type(self.pipe).__name__} changes the latents after every entry of its scheduler, as inpainting does, "
            f"also between the predictions of one step of '{self.config.name}'. Use a sampler with one prediction a "
            "step ('euler', 'dpmpp2m') with a pipe.scheduler of order 1 (EulerDiscreteScheduler, "
            "FlowMatchEulerDiscreteScheduler)."
        )

    def step(self, scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """One prediction in, the next latents out."""
        schedule = self.enter(scheduler, timestep)
        sigma = self.asked[self.stats.calls]
        wide = torch.promote_types(sample.dtype, torch.float32)
        kept = self.returned is not None and _same(sample, self.returned)
        if self.sampling is None:
            x = schedule.from_pipeline(sample.to(wide))
            session = StockSession(self.pipe, schedule, x, self.generator)
            self.sampling = self.config.sample(session)  # type: ignore[arg-type]
            event: Any = next(self.sampling)
        elif isinstance(self.event, Step):
            x = self.event.x if kept else sample.to(wide) * schedule.state_scale(sigma)
            if self.config.state == "stock":
                x = x.to(sample.dtype).to(wide)
            event = self.sampling.send(x)
        elif kept:
            x, event = self.event.x, self.event
        else:
            raise self.cannot_mix()
        _check_single(event, self.config, self.pipe)
        if event.sigma != sigma or not (event.x is x or torch.equal(event.x, x)):
            raise UnsupportedBySampler(
                f"'{self.config.name}' asks where the loop of {type(self.pipe).__name__} does not stand. It needs a "
                f"pipeline with a family: {', '.join(sorted(FAMILIES))}."
            )
        output = output if self.config.state == "stock" else output.to(wide)
        v = schedule.velocity(output, x, bcast(sigma, x))
        self.stats.calls += 1
        self.stats.nfe += len(x)
        try:
            self.event = self.sampling.send(Pred(schedule.path, x, sigma, v))
        except StopIteration as stop:
            self.event = Step(stop.value, schedule.sigmas[-1])
        self.stats.steps += isinstance(self.event, Step)
        self.returned = schedule.to_pipeline(self.event.x, self.event.sigma).to(sample.dtype)
        return self.returned

    def end(self, scheduler: Any) -> None:
        """After the call: a loop that was cut elsewhere than between two steps gave something else than asked."""
        if self.sampling is None and self.own_entries:
            raise DiffAccelError(
                f"{type(self.pipe).__name__} finished without a single scheduler step. Ask for at least one."
            )
        if self.sampling is None:
            raise self.cannot_cut(scheduler)
        if not isinstance(self.event, Step) and not getattr(self.pipe, "_interrupt", False):
            raise UnsupportedBySampler(
                f"The loop of {type(self.pipe).__name__} ended inside a step of '{self.config.name}'. "
                "Leave out denoising_end, or use a sampler with one prediction a step ('euler', 'dpmpp2m')."
            )


def generate_stock(
    pipe: Any, config: SamplerConfig, call: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[Any, Stats]:
    """Run a pipeline's own loop with a sampler in the place of its solver; returns its result and the cost."""
    loop = _Loop(pipe, config, arguments.get("generator"))
    start = time.perf_counter()
    with _patched(pipe.scheduler, loop):
        result = call(pipe, **arguments)
    loop.end(pipe.scheduler)
    loop.stats.seconds = time.perf_counter() - start
    return result, loop.stats


@contextmanager
def _patched(scheduler: Any, loop: _Loop) -> Iterator[None]:
    """The scheduler's methods redirected; signatures stay, since pipelines inspect them."""
    before = dict(scheduler.__dict__)
    set_timesteps, step, scale = scheduler.set_timesteps, scheduler.step, getattr(scheduler, "scale_model_input", None)

    @functools.wraps(set_timesteps)
    def begin(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        loop.begin(scheduler)

    @functools.wraps(step)
    def take(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(step).bind(*args, **kwargs).arguments
        latents = loop.step(scheduler, bound["model_output"], bound["timestep"], bound["sample"])
        return SimpleNamespace(prev_sample=latents) if bound.get("return_dict", True) else (latents,)

    scheduler.set_timesteps, scheduler.step = begin, take
    if scale is not None:

        @functools.wraps(scale)
        def input_at(sample: Tensor, timestep: Any = None) -> Tensor:
            return loop.input_at(scheduler, sample, timestep)

        scheduler.scale_model_input = input_at
    for name in ("add_noise", "scale_noise"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, _placed(getattr(scheduler, name), scheduler, loop))
    try:
        yield
    finally:
        scheduler.__dict__.clear()
        scheduler.__dict__.update(before)


def _placed(noise: Callable[..., Any], scheduler: Any, loop: _Loop) -> Callable[..., Any]:
    @functools.wraps(noise)
    def at_this_step(*args: Any, **kwargs: Any) -> Any:
        loop.place(scheduler, [*args, *kwargs.values()])
        return noise(*args, **kwargs)

    return at_this_step


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def _check_single(event: Any, config: SamplerConfig, pipe: Any) -> None:
    plain = isinstance(event, Eval) and event.cond == 0 and event.branch == "guided" and event.sigma.ndim == 0
    if not plain or event.rows is not None or event.at is not None:
        raise UnsupportedBySampler(
            f"'{config.name}' asks for more than one guided prediction at a time, which needs a pipeline family; "
            f"{type(pipe).__name__} has none. Supported: {', '.join(sorted(FAMILIES))}."
        )

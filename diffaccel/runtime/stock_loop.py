"""The fallback driver: a sampler inside a stock loop, for a pipeline that no family describes.

The stock loop calls its network once per entry of ``scheduler.timesteps`` and then ``scheduler.step``. Here the entries
are the noise levels at which the sampler will ask for predictions, found by rehearsing it on one number, and ``step``
hands the guided output to the sampler and returns the latents of its next request. One guided prediction at a time, at
the call's own batch and resolution: anything else raises :class:`UnsupportedBySampler`.

The rest of the loop is unchanged: a ControlNet is evaluated at every entry, and inpainting mixes the latents with the
noised original after every step, which the sampler receives as if a callback had edited them. Where a pipeline drops
the first entries (``strength`` of image-to-image) the sampler starts at the first level that is left.
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
from diffaccel.modules.guard import contents_of, restored
from diffaccel.runtime.probe import no_step
from diffaccel.runtime.stats import Stats
from diffaccel.schedules import Schedule
from diffaccel.session import Eval, Pred, Sampling, Step, bcast


class StockSession:
    """The part of a session that a stock loop can provide: initial latents, noise levels, and noise."""

    def __init__(self, pipe: Any, schedule: Schedule, x: Tensor, generator: Any) -> None:
        self.schedule, self.x, self.generator = schedule, x, generator
        self._pipeline = type(pipe).__name__

    @property
    def sigmas(self) -> Tensor:
        """``(n + 1,)`` noise levels of the call."""
        return self.schedule.sigmas

    @property
    def path(self) -> Any:
        """The noise path whose coordinates ``x`` has."""
        return self.schedule.path

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw noise from the caller's generator, as a full session does."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(tuple(x.shape), generator=self.generator, device=x.device, dtype=x.dtype)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedBySampler(
            f"The sampler needs the session's '{name}', which needs a pipeline family; {self._pipeline} has none. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )


def rehearse(config: SamplerConfig, pipe: Any, schedule: Schedule) -> list[Tensor]:
    """Return the noise levels at which a sampler will ask for predictions, in order."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device="cpu")
    sampling = config.sample(StockSession(pipe, schedule, x, torch.Generator("cpu")))  # type: ignore[arg-type]
    requested: list[Tensor] = []
    reply: Any = None
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration:
            return requested
        if isinstance(event, Step):
            reply = event.x
        else:
            _check_single(event, config, pipe)
            requested.append(event.sigma)  # type: ignore[union-attr]
            reply = Pred(schedule.path, event.x, event.sigma, torch.zeros_like(x))  # type: ignore[union-attr]


class _Loop:
    """``scheduler.step`` of one call: feeds the sampler and keeps its pending request.

    Attributes:
        requested: noise levels at which the sampler asks for predictions, one per entry of ``scheduler.timesteps``.
        has_own_entries: whether the entries are the scheduler's own, so that an index means the same in both.
        start: index of the first entry that the loop visits; None before it visits one.
        event: the sampler's latest event: a finished step, or a request within a step.
        returned: a copy of the latents that the pipeline was given last, which it may change in place.
    """

    def __init__(self, pipe: Any, config: SamplerConfig, generator: Any) -> None:
        self.pipe, self.config, self.generator = pipe, config, generator
        self.stats = Stats()
        self.schedule: Schedule | None = None
        self.requested: list[Tensor] = []
        self.has_own_entries = False
        self.start: int | None = None
        self.sampling: Sampling | None = None
        self.event: Any = None
        self.returned: Tensor | None = None

    def begin(self, scheduler: Any) -> None:
        """Replace the timesteps that the pipeline has just set by the sampler's."""
        self.schedule = schedules.read(scheduler)
        self.requested = rehearse(self.config, self.pipe, self.schedule)
        own_timesteps, self.start = scheduler.timesteps, None
        scheduler.timesteps = torch.stack([self.schedule.timestep(sigma) for sigma in self.requested])
        self.has_own_entries = _same(scheduler.timesteps, own_timesteps)
        self.pipe._num_timesteps = len(self.requested)

    def enter(self, scheduler: Any, timestep: Any) -> Schedule:
        """Return the schedule from the first entry that the loop visits; the sampler does not see earlier ones."""
        if self.schedule is None:
            raise DiffAccelError(f"{type(self.pipe).__name__} stepped its scheduler before setting timesteps.")
        if self.start is None:
            self.start = schedules.start_index(scheduler, timestep)
            if self.start:
                self.schedule, uncut = self.schedule.since(self.start), self.requested
                self.requested = rehearse(self.config, self.pipe, self.schedule) if self.has_own_entries else []
                if self.requested != uncut[self.start :]:
                    raise self.cannot_cut(scheduler)
        return self.schedule

    def cannot_cut(self, scheduler: Any) -> UnsupportedBySampler:
        """Return the error for a loop that drops first steps which the sampler cannot drop."""
        return UnsupportedBySampler(
            f"{type(self.pipe).__name__} leaves out the first steps of {type(scheduler).__name__} (`strength` or "
            f"`denoising_start`), which '{self.config.name}' cannot follow here: it does not ask once per timestep of "
            "that scheduler. Use strength=1.0, or a sampler with one prediction a step ('euler', 'dpmpp2m') with a "
            "pipe.scheduler of order 1 (EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler)."
        )

    def input_at(self, scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
        """Return the network's input for the pipeline's latents (``scale_model_input``) at the current noise level."""
        if self.schedule is None or self.schedule.path is not VE_PATH:
            return sample  # pipeline latents are the network's input already
        schedule = self.enter(scheduler, timestep)
        return schedule.network_input(sample, self.requested[min(self.stats.calls, len(self.requested) - 1)])

    def before_noising(self, scheduler: Any, arguments: list[Any]) -> None:
        """Set the scheduler's step index, where it has one, before the pipeline adds noise to something.

        Args:
            arguments: those of ``add_noise`` or ``scale_noise``.
        """
        if self.sampling is None:
            if any(isinstance(value, Tensor) and not value.numel() for value in arguments):
                raise self.cannot_cut(scheduler)  # no timestep is left
            return
        is_indexed = hasattr(scheduler, "_step_index")
        needs_own_entries = is_indexed or scheduler.timesteps.is_floating_point()  # others look up integer timesteps
        if not isinstance(self.event, Step) or (needs_own_entries and not self.has_own_entries):
            raise self.cannot_mix()
        if is_indexed:
            scheduler._step_index = (self.start or 0) + self.stats.calls

    def cannot_mix(self) -> UnsupportedBySampler:
        """Return the error for a loop that changes latents within a step of the sampler."""
        return UnsupportedBySampler(
            f"{type(self.pipe).__name__} changes the latents after every entry of its scheduler, as inpainting does, "
            f"also between the predictions of one step of '{self.config.name}'. Use a sampler with one prediction a "
            "step ('euler', 'dpmpp2m') with a pipe.scheduler of order 1 (EulerDiscreteScheduler, "
            "FlowMatchEulerDiscreteScheduler)."
        )

    def step(self, scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Answer the sampler's request with the guided ``output``.

        Returns:
            The latents of its next request, and the clean sample at this one: after the last step the latents.
        """
        schedule = self.enter(scheduler, timestep)
        sigma = self.requested[self.stats.calls]
        x, request, sampling = self._request(schedule, sigma, sample)
        _check_single(request, self.config, self.pipe)
        if request.sigma != sigma or not (request.x is x or torch.equal(request.x, x)):
            raise UnsupportedBySampler(
                f"'{self.config.name}' asks where the loop of {type(self.pipe).__name__} does not stand. It needs a "
                f"pipeline with a family: {', '.join(sorted(FAMILIES))}."
            )
        if self.config.state != "stock":
            output = output.to(_wide_dtype(sample))
        v = schedule.velocity(output, x, bcast(sigma, x))
        prediction = Pred(schedule.path, x, sigma, v)
        self.stats.calls += 1
        self.stats.nfe += len(x)
        try:
            self.event = sampling.send(prediction)
        except StopIteration as stop:
            self.event = Step(stop.value, schedule.sigmas[-1])
        self.stats.steps += isinstance(self.event, Step)
        latents = schedule.to_pipeline(self.event.x, self.event.sigma).to(sample.dtype)
        self.returned = latents.clone()
        is_last = self.stats.calls == len(self.requested)
        return latents, latents if is_last else prediction.x0.to(sample.dtype)

    def _request(self, schedule: Schedule, sigma: Tensor, sample: Tensor) -> tuple[Tensor, Any, Sampling]:
        """Return the latents that the loop stands at, the sampler's request for them, and the sampler."""
        wide = _wide_dtype(sample)
        is_unchanged = self.returned is not None and _same(sample, self.returned)
        if self.sampling is None:
            x = schedule.from_pipeline(sample.to(wide))
            session = StockSession(self.pipe, schedule, x, self.generator)
            self.sampling = self.config.sample(session)  # type: ignore[arg-type]
            return x, next(self.sampling), self.sampling
        if isinstance(self.event, Step):
            x = self.event.x if is_unchanged else sample.to(wide) * schedule.state_scale(sigma)
            if self.config.state == "stock":
                x = x.to(sample.dtype).to(wide)
            return x, self.sampling.send(x), self.sampling
        if is_unchanged:
            return self.event.x, self.event, self.sampling
        raise self.cannot_mix()

    def end(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        """Raise after a call whose loop made no step, or ended within a step of the sampler."""
        if self.sampling is None and self.has_own_entries:
            raise no_step(self.pipe, arguments)
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
    """Run a pipeline's own loop with a sampler in the place of its solver; return its result and the cost."""
    loop = _Loop(pipe, config, arguments.get("generator"))
    start = time.perf_counter()
    with _patched(pipe.scheduler, loop):
        result = call(pipe, **arguments)
    loop.end(pipe.scheduler, arguments)
    loop.stats.seconds = time.perf_counter() - start
    return result, loop.stats


@contextmanager
def _patched(scheduler: Any, loop: _Loop) -> Iterator[None]:
    """Redirect the scheduler's methods to ``loop``; signatures stay, since pipelines inspect them."""
    restore = contents_of(scheduler)
    set_timesteps, step, scale = scheduler.set_timesteps, scheduler.step, getattr(scheduler, "scale_model_input", None)

    @functools.wraps(set_timesteps)
    def begin(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        loop.begin(scheduler)

    @functools.wraps(step)
    def step_sampler(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(step).bind(*args, **kwargs).arguments
        latents, x0 = loop.step(scheduler, bound["model_output"], bound["timestep"], bound["sample"])
        if bound.get("return_dict", True):
            return SimpleNamespace(prev_sample=latents, pred_original_sample=x0, denoised=x0)
        return latents, x0

    methods: dict[str, Any] = {"set_timesteps": begin, "step": step_sampler}
    if scale is not None:

        @functools.wraps(scale)
        def input_at(sample: Tensor, timestep: Any = None) -> Tensor:
            return loop.input_at(scheduler, sample, timestep)

        methods["scale_model_input"] = input_at
    for name in ("add_noise", "scale_noise"):
        if hasattr(scheduler, name):
            methods[name] = _announced(getattr(scheduler, name), scheduler, loop)
    with restored(loop.pipe, restore):
        vars(scheduler).update(methods)
        yield


def _announced(noise: Callable[..., Any], scheduler: Any, loop: _Loop) -> Callable[..., Any]:
    """Wrap ``add_noise`` or ``scale_noise`` so that the loop hears of a call before it is made."""

    @functools.wraps(noise)
    def noise_at_this_step(*args: Any, **kwargs: Any) -> Any:
        loop.before_noising(scheduler, [*args, *kwargs.values()])
        return noise(*args, **kwargs)

    return noise_at_this_step


def _wide_dtype(sample: Tensor) -> torch.dtype:
    """Return the dtype in which the sampler keeps latents: float32 or wider."""
    return torch.promote_types(sample.dtype, torch.float32)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def _check_single(event: Any, config: SamplerConfig, pipe: Any) -> None:
    plain = isinstance(event, Eval) and event.cond == 0 and event.branch == "guided" and event.sigma.ndim == 0
    if not plain or event.rows is not None or event.at is not None:
        raise UnsupportedBySampler(
            f"'{config.name}' asks for more than one guided prediction at a time, which needs a pipeline family; "
            f"{type(pipe).__name__} has none. Supported: {', '.join(sorted(FAMILIES))}."
        )

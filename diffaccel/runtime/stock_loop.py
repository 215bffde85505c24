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

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffaccel import schedules
from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.families import FAMILIES
from diffaccel.flow import VE_PATH
from diffaccel.modules.guard import attributes_of, contents_of, restored
from diffaccel.modules.instance_method import InstanceMethod
from diffaccel.modules.stand_in import TextMemo
from diffaccel.modules.step_output import StepOutput
from diffaccel.runtime.checked_sampling import checked_sampling
from diffaccel.runtime.encodings import encodings
from diffaccel.runtime.meter import Meter
from diffaccel.runtime.probe import no_step
from diffaccel.runtime.rehearsal import StockSession, check_single, rehearse
from diffaccel.runtime.stats import Stats
from diffaccel.schedules import Schedule
from diffaccel.session import Pred, Sampling, Step, bcast


class _Loop:
    """``scheduler.step`` of one call: feeds the sampler and keeps its pending request.

    Attributes:
        prepared: called when the loop begins.
        requested: noise levels at which the sampler asks for predictions, one per entry of ``scheduler.timesteps``.
        own_timesteps, entries: the scheduler's own timesteps, and those of the requests, which replace them.
        own_levels: the scheduler's own noise levels, which those of the requests may replace.
        levels: a copy of the scheduler's noise levels at the loop's begin, which the pipeline may edit before it.
        has_own_entries: whether the entries are the scheduler's own, so that an index means the same in both.
        is_copied: whether the pipeline made a deep copy of its scheduler, whose steps are its own.
        start: index of the first entry that the loop visits; None before it visits one.
        visited: number of entries that the sampler has had its prediction for.
        event: the sampler's latest event: a finished step, or a request within a step.
        returned: a copy of the latents that the pipeline was given last, which it may change in place.
    """

    def __init__(
        self, pipe: Any, config: SamplerConfig, generator: Any, stats: Stats, prepared: Callable[[], None]
    ) -> None:
        self.prepared = prepared
        self.pipe, self.config, self.generator, self.stats = pipe, config, generator, stats
        self.schedule: Schedule | None = None
        self.requested: list[Tensor] = []
        self.own_timesteps = self.entries = torch.empty(0, dtype=torch.float32, device="cpu")
        self.own_levels: Any = None
        self.levels: Tensor | None = None
        self.has_own_entries = self.is_copied = False
        self.start: int | None = None
        self.visited = 0
        self.sampling: Sampling | None = None
        self.event: Any = None
        self.returned: Tensor | None = None

    def begin(self, scheduler: Any) -> None:
        """Replace the timesteps that the pipeline has just set by the sampler's."""
        self.schedule = schedules.read(scheduler)
        self.requested = rehearse(self.config, self.pipe, self.schedule)
        self.own_timesteps, self.start = scheduler.timesteps, None
        scheduler.timesteps = self.entries = self._entries_of(self.schedule, self.requested)
        self.has_own_entries = _same(self.entries, self.own_timesteps)
        self._check_copies()
        self.own_levels = levels = getattr(scheduler, "sigmas", None)
        if isinstance(levels, Tensor) and not self.has_own_entries and self.schedule.has_scheduler_levels:
            # loops look up the level of an entry by its index
            levels = torch.stack([*self.requested, self.schedule.sigmas[-1]]).to(levels)
            scheduler.sigmas = levels
        self.levels = levels.clone() if isinstance(levels, Tensor) else None
        self.pipe._num_timesteps = len(self.requested)

    def note_copy(self) -> None:
        """Note that the pipeline copies its scheduler, for a second stream that it steps beside the first."""
        self.is_copied = True
        if self.schedule is not None:
            self._check_copies()

    def _check_copies(self) -> None:
        """Raise where a copy of the scheduler would stand at other entries than the sampler."""
        if self.is_copied and not self.has_own_entries:
            raise UnsupportedBySampler(
                f"{type(self.pipe).__name__} steps a copy of its scheduler for a second stream, beside which "
                f"'{self.config.name}' would ask at other times. Use a sampler with one prediction a step ('euler', "
                "'dpmpp2m'), or 'scheduler'."
            )

    def _entries_of(self, schedule: Schedule, requested: list[Tensor]) -> Tensor:
        return torch.stack([schedule.timestep(sigma) for sigma in requested])

    def _read_edits(self, scheduler: Any) -> None:
        """Read the noise levels again where the pipeline edited them after they were set (as Cosmos does)."""
        levels: Any = getattr(scheduler, "sigmas", None)
        is_edited = self.levels is not None and not _same(levels, self.levels)
        if not is_edited and _same(scheduler.timesteps, self.entries):
            return
        if self.has_own_entries and _same(scheduler.timesteps, self.entries):
            self.schedule = schedules.read(scheduler)
            self.requested = rehearse(self.config, self.pipe, self.schedule)
            entries = self._entries_of(self.schedule, self.requested)
            if _same(entries, self.entries[: len(entries)]):  # a last step between equal levels changes nothing
                return
        raise UnsupportedBySampler(
            f"{type(self.pipe).__name__} changes the noise levels of its {type(scheduler).__name__} after setting "
            f"them, which '{self.config.name}' cannot follow in its loop. Use a sampler with one prediction a step "
            "('euler', 'dpmpp2m'), or 'scheduler'."
        )

    def enter(self, scheduler: Any, timestep: Any) -> Schedule:
        """Return the schedule from the first entry that the loop visits; the sampler does not see earlier ones."""
        if self.schedule is None:
            raise DiffAccelError(f"{type(self.pipe).__name__} stepped its scheduler before setting timesteps.")
        if self.start is None:
            self.prepared()
            self._read_edits(scheduler)
            self.start = schedules.start_index(scheduler, timestep)
            if self.start:
                self.schedule, uncut = self.schedule.since(self.start), self.requested
                self.requested = rehearse(self.config, self.pipe, self.schedule) if self.has_own_entries else []
                if self.requested != uncut[self.start :]:
                    raise self.cannot_cut(scheduler)
            self._show_step_index(scheduler)
        return self.schedule

    def _show_step_index(self, scheduler: Any) -> None:
        """Set the scheduler's step index to the entry at which the loop stands, as its own steps would."""
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = (self.start or 0) + self.visited

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
        return schedule.network_input(sample, self.requested[min(self.visited, len(self.requested) - 1)])

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
            self._show_step_index(scheduler)

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
        if self.visited == len(self.requested):  # a last step between equal levels
            return sample, sample
        sigma = self.requested[self.visited]
        x, request, sampling = self._request(schedule, sigma, sample)
        check_single(request, self.config, self.pipe)
        if request.sigma != sigma or not (request.x is x or torch.equal(request.x, x)):
            raise UnsupportedBySampler(
                f"'{self.config.name}' asks where the loop of {type(self.pipe).__name__} does not stand. It needs a "
                f"pipeline with a family: {', '.join(sorted(FAMILIES))}."
            )
        if self.config.state != "stock":
            output = output.to(_wide_dtype(sample))
        v = schedule.velocity(output, x, bcast(sigma, x))
        prediction = Pred(schedule.path, x, sigma, v)
        self.visited += 1
        self._show_step_index(scheduler)
        self.stats.nfe += len(x)
        try:
            self.event = sampling.send(prediction)
        except StopIteration as stop:
            self.event = Step(stop.value, schedule.sigmas[-1])
        self.stats.steps += isinstance(self.event, Step)
        latents = schedule.to_pipeline(self.event.x, self.event.sigma).to(sample.dtype)
        self.returned = latents.clone()
        is_last = self.visited == len(self.requested)
        return latents, latents if is_last else prediction.x0.to(sample.dtype)

    def _request(self, schedule: Schedule, sigma: Tensor, sample: Tensor) -> tuple[Tensor, Any, Sampling]:
        """Return the latents that the loop stands at, the sampler's request for them, and the sampler."""
        wide = _wide_dtype(sample)
        is_unchanged = self.returned is not None and _same(sample, self.returned)
        if self.sampling is None:
            x = schedule.from_pipeline(sample.to(wide))
            session: Any = StockSession(self.config, self.pipe, schedule, x, self.generator)
            self.sampling = checked_sampling(self.config, session)
            return x, next(self.sampling), self.sampling
        if isinstance(self.event, Step):
            x = self.event.x if is_unchanged else sample.to(wide) * schedule.state_scale(sigma)
            if self.config.state == "stock":
                x = x.to(sample.dtype).to(wide)
            return x, self.sampling.send(x), self.sampling
        if is_unchanged:
            return self.event.x, self.event, self.sampling
        raise self.cannot_mix()

    def leave(self, scheduler: Any) -> None:
        """Leave the scheduler as its own steps would: with its own entries, at the last one's end."""
        if self.schedule is None or self.has_own_entries:
            return
        scheduler.timesteps = self.own_timesteps
        if self.own_levels is not None:
            scheduler.sigmas = self.own_levels
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = len(self.own_timesteps)

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
    pipe: Any,
    config: SamplerConfig,
    call: Callable[..., Any],
    arguments: dict[str, Any],
    memo: TextMemo | None = None,
) -> tuple[Any, Stats]:
    """Run a pipeline's own loop with a sampler in the place of its solver; return its result and the cost.

    Args:
        memo: encodings of the call's prompts and pictures, from watching it.
    """
    meter = Meter(pipe, "stock loop")
    remember, forget = encodings(pipe, memo)
    loop = _Loop(pipe, config, arguments.get("generator"), meter.stats, forget)
    with restored(pipe, meter.remove), restored(pipe, forget):
        meter.install()
        remember()
        with _patched(pipe.scheduler, loop), meter.stats.timed(meter.device):
            result = call(pipe, **arguments)
    loop.end(pipe.scheduler, arguments)
    return result, meter.finish()


@contextmanager
def _patched(scheduler: Any, loop: _Loop) -> Iterator[None]:
    """Redirect the scheduler's methods to ``loop``; signatures stay, since pipelines inspect them."""
    restore_all = contents_of(scheduler)  # after an error
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def begin(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        loop.begin(scheduler)

    def step_sampler(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(step).bind(*args, **kwargs).arguments
        latents, x0 = loop.step(scheduler, bound["model_output"], bound["timestep"], bound["sample"])
        if bound.get("return_dict", True):
            return StepOutput(latents, x0, x0)
        return latents, x0

    def input_at(sample: Tensor, timestep: Any = None) -> Tensor:
        return loop.input_at(scheduler, sample, timestep)

    methods: dict[str, Any] = {"set_timesteps": begin, "step": step_sampler}
    if hasattr(scheduler, "scale_model_input"):
        methods["scale_model_input"] = input_at
    for name in ("add_noise", "scale_noise"):
        if hasattr(scheduler, name):
            methods[name] = _announced(getattr(scheduler, name), scheduler, loop)
    on_copy = {"step": loop.note_copy}
    methods = {name: InstanceMethod(scheduler, name, m, on_copy.get(name)) for name, m in methods.items()}
    restore_methods = attributes_of(scheduler, [*methods])
    is_done = False

    def restore() -> None:
        (restore_methods if is_done else restore_all)()  # a whole call leaves what the stock one leaves

    with restored(loop.pipe, restore):
        vars(scheduler).update(methods)
        yield
        loop.leave(scheduler)
        is_done = True


def _announced(noise: Callable[..., Any], scheduler: Any, loop: _Loop) -> Callable[..., Any]:
    """Wrap ``add_noise`` or ``scale_noise`` so that the loop hears of a call before it is made."""

    def noise_at_this_step(*args: Any, **kwargs: Any) -> Any:
        loop.before_noising(scheduler, [*args, *kwargs.values()])
        return noise(*args, **kwargs)

    return noise_at_this_step


def _wide_dtype(sample: Tensor) -> torch.dtype:
    """Return the dtype in which the sampler keeps latents: float32 or wider."""
    return torch.promote_types(sample.dtype, torch.float32)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))

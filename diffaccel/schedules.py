"""The noise schedule of a diffusers scheduler: its path, levels, timesteps, and the scaling of the network's input.

A scheduler object mixes a noise schedule with a solver. Samplers bring their own solver, so only the schedule is read
here, once, after ``set_timesteps``. Three conventions exist among diffusers' schedulers:

- flow: state and network input are ``(1 - sigma) x0 + sigma eps`` and the network returns ``eps - x0``;
- VE state (Euler, Heun, LMS, KDPM2): state is ``x0 + sigma eps``, network input is that over ``sqrt(sigma^2 + 1)``;
- VP state (DDIM, DDPM, PNDM, DPM++, UniPC, ...): state and network input are ``sqrt(abar) x0 + sqrt(1 - abar) eps``.

The first and the last are walked on the linear path (for VP an exact change of variables which stays finite when the
terminal signal-to-noise ratio is zero), the second in its own coordinates, where Euler is the scheduler's own step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH, Path, Prediction, Tabulated, x0_eps

VE_STATE = {
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
}  # fmt: skip
VP_STATE = {
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler",
    "DDIMParallelScheduler", "DDPMParallelScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
}  # fmt: skip
FLOW_STATE = {
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
}  # fmt: skip
ENDS_AT_FINAL = {  # at final_alpha_cumprod, often not 1
    "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
}  # fmt: skip
OWN_RULES = (  # what a subclass of these must leave alone for their convention to be its own
    "step", "set_timesteps", "scale_model_input", "add_noise", "scale_noise", "get_velocity", "init_noise_sigma",
    "index_for_timestep", "_init_step_index", "convert_model_output",
)  # fmt: skip
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction", "flow_prediction": "velocity",
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """A pipeline's noise schedule for one call.

    Attributes:
        path: the coordinates that samplers see, linear or VE; both are parametrised by ``sigma`` itself.
        sigmas: ``(n + 1,)`` fp32 on the CPU, falling, from the first noise level of the call to the scheduler's
            last, which is zero unless its config says otherwise.
        timesteps: ``(n,)`` times that the pipeline passes to its network at ``sigmas[:-1]``, on the pipeline's device.
        prediction: type of the network's output.
        vp: whether the network's input is variance preserving, ``x0 + sigma eps`` over ``sqrt(1 + sigma^2)``.
        device: where the scheduler itself keeps its noise levels. It matters to the bit: a level on a GPU is rounded to
            the dtype of the tensor that it multiplies, one on the CPU is not.
        table: the trained noise levels, for times between those of the grid; None for flow models.
        continuous: whether the network's time is ``log(sigma) / 4`` (EDM, arXiv 2206.00364) and not a train step.
        entries: the place of every level among the scheduler's own entries, which may have one level twice; () for
            one entry a level.
    """

    path: Path
    sigmas: Tensor
    timesteps: Tensor
    prediction: Prediction
    vp: bool
    num_train_timesteps: int
    table: Tabulated | None = None
    device: torch.device | str = "cpu"
    continuous: bool = False
    entries: tuple[int, ...] = ()
    _index: dict[float, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._index.update({float(s): i for i, s in enumerate(self.sigmas[:-1])})

    @cached_property
    def stock_sigmas(self) -> Tensor:
        """``sigmas`` on the device where the scheduler keeps them."""
        return self.sigmas.to(self.device, copy=True)

    @property
    def has_scheduler_levels(self) -> bool:
        """Whether ``sigmas`` are the scheduler's own numbers; those of VP states are converted."""
        return not self.vp or self.path is VE_PATH

    def since(self, index: int) -> Schedule:
        """Return the schedule without its first ``index`` steps."""
        entries = tuple(entry - self.entries[index] for entry in self.entries[index:])
        return replace(self, sigmas=self.sigmas[index:], timesteps=self.timesteps[index:], entries=entries, _index={})

    def take_levels(self, levels: Tensor, first: int) -> None:
        """Replace the levels from number ``first`` on, in place; each keeps its time.

        Args:
            levels: ``(n + 1,)``, all of them.
        """
        for own in (self.sigmas, self.stock_sigmas):
            own[first:] = levels[first:].to(own)
        self._index.clear()
        self.__post_init__()

    def entry(self, level: int) -> int:
        """Return the place of a level among the scheduler's own entries, counted from the first of this schedule."""
        return self.entries[level] if self.entries else level

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the network's time at ``sigma`` (scalar or one per row): the pipeline's own on the grid.

        Off the grid the time of a flow model is ``sigma * num_train_timesteps``, of a continuous model
        ``log(sigma) / 4``, and of a tabulated model the (fractional) train step of equal log signal-to-noise ratio.
        """
        if sigma.ndim == 0 and _same_memory(sigma, self.stock_sigmas):
            place = sigma.storage_offset()  # the index of a view needs no device sync
            if place < len(self.timesteps):  # the last level may be one at which only some samplers ask
                return self.timesteps[place]
        index = [self._index.get(level, -1) for level in sigma.reshape(-1).tolist()]
        if -1 not in index:
            return self.timesteps[index if sigma.ndim else index[0]]
        if self.continuous:
            time = torch.log(sigma) / 4
        elif self.table is None:
            time = sigma * self.num_train_timesteps
        else:
            time = self.table.at(self.path.rho(sigma.double())).to(torch.float32)
        time = time.to(self.timesteps.device)
        on_grid = [row for row, i in enumerate(index) if i >= 0]  # a row's time must not depend on the other rows
        if on_grid:
            time[on_grid] = self.timesteps[[index[row] for row in on_grid]].to(time.dtype)
        return time

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the network's input: ``x`` for flow models, ``x / sqrt(alpha^2 + sigma^2)`` for VP models."""
        if not self.vp:
            return x
        if self.path is VE_PATH:
            return x / ((sigma**2 + 1) ** 0.5)
        return x / ((1 - sigma) ** 2 + sigma**2) ** 0.5

    def velocity(self, out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the path's velocity from the network's output. ``sigma`` broadcasts against ``x``.

        In VE coordinates the arithmetic is that of ``EulerDiscreteScheduler.step``, so that Euler is equal to the bit.
        """
        if not self.vp:
            return out
        if self.path is VE_PATH:
            if self.prediction == "epsilon":
                x0 = x - sigma * out
            elif self.prediction == "sample":
                x0 = out
            else:
                x0 = out * (-sigma / (sigma**2 + 1) ** 0.5) + (x / (sigma**2 + 1))
            return (x - x0) / sigma
        norm = ((1 - sigma) ** 2 + sigma**2) ** 0.5
        x0, eps = x0_eps(self.prediction, out, x / norm, (1 - sigma) / norm, sigma / norm)
        return eps - x0

    def from_pipeline(self, latents: Tensor) -> Tensor:
        """Convert the pipeline's latents at the first noise level to this schedule's coordinates."""
        return latents * self.state_scale(self.sigmas[0])

    def to_pipeline(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Convert latents at ``sigma`` to the pipeline's coordinates; at zero all coordinates agree."""
        return x / self.state_scale(sigma)

    def state_scale(self, sigma: Tensor) -> Tensor | float:
        """Return the factor from the pipeline's latents at ``sigma`` to this schedule's coordinates."""
        if not self.vp or self.path is VE_PATH:
            return 1.0
        return ((1 - sigma) ** 2 + sigma**2) ** 0.5


def read(scheduler: Any, first: Any = None) -> Schedule:
    """Return the schedule of a diffusers scheduler on which ``set_timesteps`` was called.

    Args:
        first: the timestep of the pipeline's first ``scheduler.step``, where the schedule begins: image-to-image calls
            start in the middle of the grid. None for all of it.

    Raises:
        DiffAccelError: for a scheduler or prediction type whose convention is not known here.
    """
    name, config = known_name(scheduler), scheduler.config
    start = start_index(scheduler, first)
    kind = config.get("prediction_type")
    is_flow = name in FLOW_STATE or bool(config.get("use_flow_sigmas")) or kind == "flow_prediction"
    replaced = _replaced_rules(scheduler)
    if replaced or (not is_flow and name not in VE_STATE | VP_STATE):
        supported = ", ".join(sorted(FLOW_STATE | VE_STATE | VP_STATE))
        problem = f"The scheduler {type(scheduler).__name__} is not supported{replaced}."
        if getattr(scheduler, "is_of_student", False):
            raise DiffAccelError(
                f"{problem} A distilled student draws by its own steps: leave the sampler out, and distil from its "
                "teacher."
            )
        raise DiffAccelError(f"{problem} Set pipe.scheduler to one of: {supported}.")
    for flag in ("clip_sample", "thresholding"):
        if config.get(flag):
            raise DiffAccelError(
                f"{name} has {flag}=True, a rule of its own solver that other samplers do not follow. "
                f"Set pipe.scheduler = {name}.from_config(pipe.scheduler.config, {flag}=False)."
            )
    if is_flow:
        return _read_flow(scheduler, start)
    prediction = PREDICTIONS.get(config.prediction_type)
    if prediction is None:
        raise DiffAccelError(
            f"{name} has prediction_type '{config.prediction_type}'; supported are {', '.join(PREDICTIONS)}."
        )
    return (_read_ve if name in VE_STATE else _read_vp)(scheduler, start, prediction)


def known_name(scheduler: Any) -> str:
    """Return the name of the nearest listed class whose convention a scheduler inherits, or that of its own class."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    return next((name for name in names if name in FLOW_STATE | VE_STATE | VP_STATE), names[0])


def _replaced_rules(scheduler: Any) -> str:
    """Return in words which rules of its listed base class a scheduler replaces; "" for none, or without such a base.

    A subclass with rules of its own may have another convention.
    """
    base = known_name(scheduler)
    below = list(itertools.takewhile(lambda cls: cls.__name__ != base, type(scheduler).__mro__))
    replaced = [rule for rule in OWN_RULES if any(rule in vars(cls) for cls in below)]
    if not replaced or len(below) == len(type(scheduler).__mro__):
        return ""
    return f": it replaces {', '.join(replaced)} of {base}"


def _read_flow(scheduler: Any, start: int) -> Schedule:
    """Return the schedule of a flow model, in its own coordinates."""
    name, config = known_name(scheduler), scheduler.config
    kind, has_flow_sigmas = config.get("prediction_type"), bool(config.get("use_flow_sigmas"))
    if config.get("invert_sigmas"):
        raise DiffAccelError(
            f"{name} with invert_sigmas=True runs its noise level backwards, which no sampler here can follow; "
            "use a pipeline whose scheduler config has invert_sigmas=False."
        )
    if name not in FLOW_STATE and not (has_flow_sigmas and kind == "flow_prediction"):
        raise DiffAccelError(
            f"{name} has prediction_type '{kind}' with use_flow_sigmas={has_flow_sigmas}: a flow model needs both. Set "
            f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, prediction_type='flow_prediction', "
            "use_flow_sigmas=True), or use_flow_sigmas=False and the prediction type the model was trained with."
        )
    sigmas, timesteps, entries = _distinct_levels(scheduler.sigmas[start:], scheduler.timesteps[start:])
    train = int(config.num_train_timesteps)
    # the VE and VP schedulers keep their levels on the CPU, these where the pipeline runs
    device = scheduler.sigmas.device
    return Schedule(LINEAR, sigmas, timesteps, "velocity", False, train, device=device, entries=entries)


def _read_ve(scheduler: Any, start: int, prediction: Prediction) -> Schedule:
    """Return the schedule of a scheduler with VE state, in its own coordinates."""
    config = scheduler.config
    table = Tabulated(scheduler.alphas_cumprod)
    sigmas, timesteps, entries = _distinct_levels(scheduler.sigmas[start:], scheduler.timesteps[start:])
    continuous = config.get("timestep_type") == "continuous" and prediction == "v_prediction"
    return Schedule(
        VE_PATH, sigmas, timesteps, prediction, True, int(config.num_train_timesteps), table,
        continuous=continuous, entries=entries,
    )  # fmt: skip


def _read_vp(scheduler: Any, start: int, prediction: Prediction) -> Schedule:
    """Return the schedule of a scheduler with VP state, on the linear path at equal signal-to-noise ratio."""
    name = known_name(scheduler)
    table = Tabulated(scheduler.alphas_cumprod)
    timesteps = scheduler.timesteps
    whole = None
    if len(getattr(scheduler, "sigmas", ())) == len(timesteps) + 1:
        ve_sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float64, device="cpu").detach()
        sigmas, timesteps = (ve_sigmas / (1 + ve_sigmas))[start:], timesteps[start:]
    else:
        whole = _whole_steps(scheduler, start)
        timesteps = timesteps[whole.to(timesteps.device)]
        final = scheduler.final_alpha_cumprod if name in ENDS_AT_FINAL else 1.0
        last = Tabulated(torch.as_tensor(final, dtype=torch.float64, device="cpu")[None])
        sigmas = LINEAR.at(torch.cat([table.rho(timesteps), last.rho(0.0)[None]]))
    sigmas, timesteps, entries = _distinct_levels(sigmas, timesteps)
    if whole is not None:
        places = [*(whole - start).tolist(), len(scheduler.timesteps) - start]
        entries = tuple(places[entry] for entry in entries)
    if prediction == "epsilon" and bool(sigmas[0] == 1):
        raise DiffAccelError(
            f"{name} has a zero terminal signal-to-noise ratio, where an epsilon prediction says nothing about the "
            "sample. Use a v_prediction model, or a schedule without rescale_betas_zero_snr."
        )
    train = int(scheduler.config.num_train_timesteps)
    return Schedule(LINEAR, sigmas, timesteps, prediction, True, train, table, entries=entries)


def start_index(scheduler: Any, first: Any) -> int:
    """Return the index of a pipeline's first step in ``scheduler.timesteps``; image-to-image starts in the middle.

    Args:
        first: the timestep that the pipeline passed to its first ``scheduler.step``; None for a whole grid.

    Raises:
        DiffAccelError: for a timestep that the grid does not have.
    """
    timesteps = scheduler.timesteps
    if first is None:
        return 0
    if isinstance(first, Tensor) and first.numel() == 1 and _same_memory(first, timesteps):
        return (first.storage_offset() - timesteps.storage_offset()) // (timesteps.stride(0) or 1)
    index: int | None = getattr(scheduler, "begin_index", None)
    if index is not None:
        return index
    value = float(first.reshape(-1)[0] if isinstance(first, Tensor) else first)
    matches = (timesteps.to("cpu", torch.float64) == value).nonzero()[:, 0]
    if not len(matches):
        raise DiffAccelError(
            f"The pipeline starts at timestep {first}, which is none of the {len(timesteps)} of its "
            f"{type(scheduler).__name__}, from {float(timesteps[0])} to {float(timesteps[-1])}. "
            "Set pipe.scheduler to one whose timesteps the pipeline uses as they are."
        )
    return int(matches[0])


def _whole_steps(scheduler: Any, start: int) -> Tensor:
    """Return the entries from ``start`` on, one for each Runge-Kutta step of PNDM, which makes four calls."""
    midpoints = len(getattr(scheduler, "prk_timesteps", ()))
    if start < midpoints and start % 4:
        raise DiffAccelError(
            f"The pipeline starts inside a Runge-Kutta step of {type(scheduler).__name__}, which only that solver "
            "follows. Set pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)."
        )
    total = len(scheduler.timesteps)
    places = [*range(start, midpoints, 4), *range(max(start, midpoints), total)]
    return torch.tensor(places, dtype=torch.long, device="cpu")


def _same_memory(view: Tensor, base: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _distinct_levels(sigmas: Any, timesteps: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return the noise levels without repetition, the network's times at all but the last, and the entries of all.

    Heun, KDPM2 and PNDM evaluate a level twice, of which the second entry is kept; a last step between equal levels is
    dropped. Times rounded to integers may repeat although their levels differ.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").detach()[: len(timesteps) + 1]
    final = torch.ones(1, dtype=torch.bool, device="cpu")
    last_entries = torch.cat([levels[1:] != levels[:-1], final]).nonzero()[:, 0]
    times = timesteps[last_entries[:-1].to(timesteps.device)]
    return levels[last_entries], times, tuple(last_entries.tolist())

"""What a diffusers scheduler means: its noise path, its grid, its timesteps, and how the network is fed.

A scheduler object mixes a noise schedule with a solver. Samplers bring their own solver, so only the schedule is read
here, once, after ``set_timesteps``. Three conventions exist among diffusers' schedulers:

- flow: state and network input are ``(1 - sigma) x0 + sigma eps`` and the network returns ``eps - x0``;
- VE state (Euler, Heun, LMS, KDPM2): state is ``x0 + sigma eps``, network input is that over ``sqrt(sigma^2 + 1)``;
- VP state (DDIM, DDPM, PNDM, DPM++, UniPC, ...): state and network input are ``sqrt(abar) x0 + sqrt(1 - abar) eps``.

The first and the last are walked on the linear path (for VP an exact change of variables which stays finite when the
terminal signal-to-noise ratio is zero), the second in its own coordinates, where Euler is the scheduler's own step.
"""

from __future__ import annotations

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
        timesteps: ``(n,)`` what the pipeline tells its network at ``sigmas[:-1]``, on the pipeline's device.
        prediction: what the network returns.
        vp: whether the network's input is variance preserving, ``x0 + sigma eps`` over ``sqrt(1 + sigma^2)``.
        device: where the scheduler itself keeps its noise levels. It matters to the bit: a level on a GPU is rounded to
            the dtype of what it multiplies, one on the CPU is not.
        table: the trained noise levels, for times between those of the grid; None for flow models.
        continuous: whether the network's time is ``log(sigma) / 4`` (EDM, arXiv 2206.00364) and not a train step.
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
    _index: dict[float, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._index.update({float(s): i for i, s in enumerate(self.sigmas[:-1])})

    @cached_property
    def stock_sigmas(self) -> Tensor:
        """``sigmas`` where the scheduler keeps them."""
        return self.sigmas.to(self.device, copy=True)

    def since(self, index: int) -> Schedule:
        """The schedule without its first ``index`` steps."""
        return replace(self, sigmas=self.sigmas[index:], timesteps=self.timesteps[index:], _index={})

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's time at ``sigma`` (scalar or one per row): the pipeline's own on the grid, interpolated off it.

        Off the grid the linear path of a flow model gives ``sigma * num_train_timesteps``, a continuous model
        ``log(sigma) / 4``; a tabulated model is asked at the time of equal log signal-to-noise ratio.
        """
        if sigma.ndim == 0 and _same_memory(sigma, self.stock_sigmas):
            return self.timesteps[sigma.storage_offset()]  # a view knows its place, and no device is waited for
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
        known = [row for row, i in enumerate(index) if i >= 0]  # a row's time must not depend on the other rows
        if known:
            time[known] = self.timesteps[[index[row] for row in known]].to(time.dtype)
        return time

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``x`` as the network wants it: unchanged for flow models, over ``sqrt(alpha^2 + sigma^2)`` for VP models."""
        if not self.vp:
            return x
        if self.path is VE_PATH:
            return x / ((sigma**2 + 1) ** 0.5)
        return x / ((1 - sigma) ** 2 + sigma**2) ** 0.5

    def velocity(self, out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The path's velocity from the network's output. ``sigma`` broadcasts against ``x``.

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
        """The pipeline's latents at the first noise level in this schedule's coordinates."""
        return latents * self.state_scale(self.sigmas[0])

    def to_pipeline(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of :meth:`from_pipeline` at ``sigma``; at zero all coordinates agree."""
        return x / self.state_scale(sigma)

    def state_scale(self, sigma: Tensor) -> Tensor | float:
        if not self.vp or self.path is VE_PATH:
            return 1.0
        return ((1 - sigma) ** 2 + sigma**2) ** 0.5


def read(scheduler: Any, first: Any = None) -> Schedule:
    """The schedule of a diffusers scheduler on which ``set_timesteps`` was called.

    Args:
        first: the timestep of the pipeline's first ``scheduler.step``, where the schedule begins: image-to-image calls
            start in the middle of the grid. None for all of it.

    Raises:
        DiffAccelError: for a scheduler or prediction type whose convention is not known here.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    start = begin(scheduler, first)
    train = int(config.num_train_timesteps)
    kind, flow_sigmas = config.get("prediction_type"), bool(config.get("use_flow_sigmas"))
    flow = name in FLOW_STATE or flow_sigmas or kind == "flow_prediction"
    if not flow and name not in VE_STATE | VP_STATE:
        known = ", ".join(sorted(FLOW_STATE | VE_STATE | VP_STATE))
        raise DiffAccelError(f"The scheduler {name} is not supported. Set pipe.scheduler to one of: {known}.")
    for flag in ("clip_sample", "thresholding"):
        if config.get(flag):
            raise DiffAccelError(
                f"{name} has {flag}=True, a rule of its own solver that other samplers do not follow. "
                f"Set pipe.scheduler = {name}.from_config(pipe.scheduler.config, {flag}=False)."
            )
    if flow:
        if config.get("invert_sigmas"):
            raise DiffAccelError(
                f"{name} with invert_sigmas=True runs its noise level backwards, which no sampler here can follow; "
                "use a pipeline whose scheduler config has invert_sigmas=False."
            )
        if name not in FLOW_STATE and not (flow_sigmas and kind == "flow_prediction"):
            raise DiffAccelError(
                f"{name} has prediction_type '{kind}' with use_flow_sigmas={flow_sigmas}: a flow model needs both. Set "
                f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, prediction_type='flow_prediction', "
                "use_flow_sigmas=True), or use_flow_sigmas=False and the prediction type the model was trained with."
            )
        sigmas, timesteps = _once(scheduler.sigmas[start:], scheduler.timesteps[start:])
        # the VE and VP schedulers keep their levels on the CPU, these where the pipeline runs
        return Schedule(LINEAR, sigmas, timesteps, "velocity", False, train, device=scheduler.sigmas.device)
    prediction = PREDICTIONS.get(config.prediction_type)
    if prediction is None:
        raise DiffAccelError(
            f"{name} has prediction_type '{config.prediction_type}'; supported are {', '.join(PREDICTIONS)}."
        )
    table = Tabulated(scheduler.alphas_cumprod)
    if name in VE_STATE:
        sigmas, timesteps = _once(scheduler.sigmas[start:], scheduler.timesteps[start:])
        continuous = config.get("timestep_type") == "continuous" and prediction == "v_prediction"
        return Schedule(VE_PATH, sigmas, timesteps, prediction, True, train, table, continuous=continuous)
    timesteps = scheduler.timesteps
    if len(getattr(scheduler, "sigmas", ())) == len(timesteps) + 1:
        ve = torch.as_tensor(scheduler.sigmas).detach().to("cpu", torch.float64)
        sigmas, timesteps = (ve / (1 + ve))[start:], timesteps[start:]
    else:
        timesteps = _whole_steps(scheduler, start)
        last = Tabulated(torch.as_tensor(scheduler.final_alpha_cumprod if name in ENDS_AT_FINAL else 1.0)[None])
        sigmas = LINEAR.at(torch.cat([table.rho(timesteps), last.rho(0.0)[None]]))
    sigmas, timesteps = _once(sigmas, timesteps)
    if prediction == "epsilon" and bool(sigmas[0] == 1):
        raise DiffAccelError(
            f"{name} has a zero terminal signal-to-noise ratio, where an epsilon prediction says nothing about the "
            "sample. Use a v_prediction model, or a schedule without rescale_betas_zero_snr."
        )
    return Schedule(LINEAR, sigmas, timesteps, prediction, True, train, table)


def begin(scheduler: Any, first: Any) -> int:
    """The place of a pipeline's first step in ``scheduler.timesteps``: image-to-image calls start in the middle.

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
    matches = (timesteps == torch.as_tensor(first).reshape(-1)[:1].to(timesteps.device)).nonzero()[:, 0]
    if not len(matches):
        raise DiffAccelError(
            f"The pipeline starts at timestep {first}, which is none of the {len(timesteps)} of its "
            f"{type(scheduler).__name__}, from {float(timesteps[0])} to {float(timesteps[-1])}. "
            "Set pipe.scheduler to one whose timesteps the pipeline uses as they are."
        )
    return int(matches[0])


def _whole_steps(scheduler: Any, start: int) -> Tensor:
    """The timesteps from ``start`` on without the midpoints of PNDM's Runge-Kutta steps, which make four calls each."""
    timesteps: Tensor = scheduler.timesteps
    midpoints = len(getattr(scheduler, "prk_timesteps", ()))
    if start < midpoints and start % 4:
        raise DiffAccelError(
            f"The pipeline starts inside a Runge-Kutta step of {type(scheduler).__name__}, which only that solver "
            "follows. Set pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)."
        )
    return torch.cat([timesteps[start:midpoints:4], timesteps[max(start, midpoints) :]])


def _same_memory(view: Tensor, base: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _once(sigmas: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The noise levels, each once, and the network's times at all but the last of them.

    Heun, KDPM2 and PNDM stand on a level twice, the second time at its own time; a last step that changes no level is
    none. Times rounded to integers may repeat although their levels differ.
    """
    levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float32)[: len(timesteps) + 1]
    leaves = torch.cat([levels[1:] != levels[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    return levels[leaves], timesteps[leaves[:-1].to(timesteps.device)]

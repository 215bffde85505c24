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

from dataclasses import dataclass, field
from typing import Any, cast

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
    "DDIMParallelScheduler", "DDPMParallelScheduler",
}  # fmt: skip
FLOW_STATE = {
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
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
    """

    path: Path
    sigmas: Tensor
    timesteps: Tensor
    prediction: Prediction
    vp: bool
    num_train_timesteps: int
    table: Tabulated | None = None
    _index: dict[float, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._index.update({float(s): i for i, s in enumerate(self.sigmas[:-1])})

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's time at ``sigma`` (scalar or one per row): the pipeline's own on the grid, interpolated off it.

        Off the grid the linear path of a flow model gives ``sigma * num_train_timesteps``; a tabulated model is asked
        at the time of equal log signal-to-noise ratio.
        """
        if sigma.ndim == 0:
            on_grid = self._index.get(float(sigma))
            if on_grid is not None:
                return self.timesteps[on_grid]
        elif all(float(s) in self._index for s in sigma):
            return self.timesteps[[self._index[float(s)] for s in sigma]]
        if self.table is None:
            time = sigma * self.num_train_timesteps
        else:
            time = self.table.at(self.path.rho(sigma.double())).to(torch.float32)
        return time.to(self.timesteps.device)

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
        return latents * self._state_scale(self.sigmas[0])

    def to_pipeline(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of :meth:`from_pipeline` at ``sigma``; at zero all coordinates agree."""
        return x / self._state_scale(sigma)

    def _state_scale(self, sigma: Tensor) -> Tensor | float:
        if not self.vp or self.path is VE_PATH:
            return 1.0
        return ((1 - sigma) ** 2 + sigma**2) ** 0.5


def read(scheduler: Any) -> Schedule:
    """The schedule of a diffusers scheduler on which ``set_timesteps`` was called.

    Raises:
        DiffAccelError: for a scheduler or prediction type whose convention is not known here.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    train = int(config.num_train_timesteps)
    timesteps = torch.unique_consecutive(scheduler.timesteps)  # Heun, KDPM2 and PNDM visit some times twice
    if name in FLOW_STATE or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        if config.get("invert_sigmas"):
            raise DiffAccelError(
                f"{name} with invert_sigmas=True runs its noise level backwards, which no sampler here can follow; "
                "use a pipeline whose scheduler config has invert_sigmas=False."
            )
        return Schedule(LINEAR, _levels(scheduler.sigmas), timesteps, "velocity", False, train)
    if name not in VE_STATE | VP_STATE:
        known = ", ".join(sorted(FLOW_STATE | VE_STATE | VP_STATE))
        raise DiffAccelError(f"The scheduler {name} is not supported. Set pipe.scheduler to one of: {known}.")
    prediction = PREDICTIONS.get(config.prediction_type)
    if prediction is None:
        raise DiffAccelError(
            f"{name} has prediction_type '{config.prediction_type}'; supported are {', '.join(PREDICTIONS)}."
        )
    for flag in ("clip_sample", "thresholding"):
        if config.get(flag):
            raise DiffAccelError(
                f"{name} has {flag}=True, a rule of its own solver that other samplers do not follow. "
                f"Set pipe.scheduler = {name}.from_config(pipe.scheduler.config, {flag}=False)."
            )
    table = Tabulated(scheduler.alphas_cumprod)
    if name in VE_STATE:
        sigmas = _levels(scheduler.sigmas)
        if len(timesteps) != len(sigmas) - 1:  # KDPM2 puts midpoints of its own solver between the times
            timesteps = table.at(VE_PATH.rho(sigmas[:-1].double())).to(timesteps.device, torch.float32)
        return Schedule(VE_PATH, sigmas, timesteps, prediction, True, train, table)
    if len(getattr(scheduler, "sigmas", ())) == len(scheduler.timesteps) + 1:
        ve = _levels(scheduler.sigmas).double()
        sigmas = ve / (1 + ve)
    else:
        rho = table.rho(timesteps)
        sigmas = torch.cat([cast(Tensor, LINEAR.at(rho)), torch.zeros(1, dtype=torch.float64)])
    if prediction == "epsilon" and bool(sigmas[0] == 1):
        raise DiffAccelError(
            f"{name} has a zero terminal signal-to-noise ratio, where an epsilon prediction says nothing about the "
            "sample. Use a v_prediction model, or a schedule without rescale_betas_zero_snr."
        )
    return Schedule(LINEAR, sigmas.float(), timesteps, prediction, True, train, table)


def _levels(sigmas: Tensor) -> Tensor:
    """The scheduler's noise levels, each once."""
    return torch.unique_consecutive(torch.as_tensor(sigmas).detach().to("cpu", torch.float32))

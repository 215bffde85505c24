"""The scheduler of a one-step student: whatever number of steps is asked for, one is made."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffaccel.distill.options import Start
from diffaccel.distill.parameterization import Kind, clean
from diffaccel.modules.step_output import StepOutput


class SIMOneStepScheduler(SchedulerMixin, ConfigMixin):
    """Draws ``x0`` from noise by one network call at the level for which a student was trained.

    It fits stock pipelines of flow and variance-preserving models: initial noise has deviation one, and the network's
    output there is turned into the clean estimate. Timesteps, sigmas and the number of steps of a call are ignored.

    Args:
        a, s: coefficients of signal and noise at the level.
        timestep: the network's time there, as the pipeline passes it on.
        prediction_type: type of the output: "epsilon", "v_prediction", "sample" or "velocity".
        start: what the network is given: the noise itself ("unit"), or ``s`` times it ("scaled"), which pipelines can
            do that scale their model's input.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        a: float = 0.2857142857142857,
        s: float = 0.7142857142857143,
        timestep: float = 714.2857142857143,
        prediction_type: Kind = "velocity",
        start: Start = "unit",
        num_train_timesteps: int = 1000,
    ) -> None:
        self.set_timesteps()

    @property
    def step_index(self) -> int:
        """Number of steps made: 0 until the call has finished."""
        return self.steps_made

    @property
    def begin_index(self) -> int:
        """Index of the first step."""
        return 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Accept the only index that there is."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Prepare the one step."""
        self.num_inference_steps, self.steps_made = 1, 0
        self.timesteps = torch.tensor([self.config.timestep], dtype=torch.float32, device=device or "cpu")
        self.sigmas = torch.tensor([self.config.s, 0.0], dtype=torch.float32, device="cpu")

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the network's input: the sample, at the deviation for which the student was trained."""
        return sample * self.config.s if self.config.start == "scaled" else sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **ignored: Any
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Return the clean estimate, computed in float32, in the sample's dtype."""
        a, s = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in (self.config.a, self.config.s))
        x = self.scale_model_input(sample.float())
        x0 = clean(self.config.prediction_type, model_output.float(), x, a, s).to(sample.dtype)
        self.steps_made = 1
        return StepOutput(x0, x0, x0) if return_dict else (x0, x0)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

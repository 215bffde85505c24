"""The schedulers of students: whatever number of steps is asked for, those that a student learnt are made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin  # from_pretrained looks for SchedulerMixin beside a scheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffaccel.distill.parameterization import Kind, clean
from diffaccel.distill.stage import Start
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

    is_of_student = True
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
    def levels(self) -> Sequence[Sequence[float]]:
        """``(a, s, timestep)`` of every call: coefficients of signal and noise, and the network's time."""
        return ((self.config.a, self.config.s, self.config.timestep),)

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
        """Prepare the steps that the student learnt."""
        levels = self.levels
        self.num_inference_steps, self.steps_made = len(levels), 0
        self.timesteps = torch.tensor([t for _, _, t in levels], dtype=torch.float32, device=device or "cpu")
        self.sigmas = torch.tensor([*(s for _, s, _ in levels), 0.0], dtype=torch.float32, device="cpu")

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


class SIMFewStepScheduler(SIMOneStepScheduler):
    """Draws in as many network calls as a student was trained for, ``x_{i+1} = a_{i+1} x0_i + s_{i+1} eps_i``.

    Timesteps, sigmas and the number of steps of a call are ignored, as by the scheduler of one step. Pipelines pass no
    generator on to a step, so the noise ``eps_i`` of a row is made from a hash of the row's initial noise: a picture
    depends on its own seed alone.

    Args:
        levels: ``(a, s, timestep)`` of every call: coefficients of signal and noise, and the network's time.
        prediction_type, start: as those of the scheduler of one step; only the first call's input is scaled.
    """

    seeds: Sequence[int] = ()  # of the rows of a call, from its first step on

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        levels: Sequence[Sequence[float]] = (
            (0.2857142857142857, 0.7142857142857143, 714.2857142857143),
            (0.6428571428571428, 0.35714285714285715, 357.14285714285717),
        ),
        prediction_type: Kind = "velocity",
        start: Start = "unit",
        num_train_timesteps: int = 1000,
    ) -> None:
        self.set_timesteps()

    @property
    def levels(self) -> Sequence[Sequence[float]]:
        """``(a, s, timestep)`` of every call."""
        levels: Sequence[Sequence[float]] = self.config.levels
        return levels

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the network's input: the sample, the first at the deviation for which the student was trained."""
        is_scaled = self.config.start == "scaled" and self.steps_made == 0
        return sample * self.levels[0][1] if is_scaled else sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **ignored: Any
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Return the clean estimate, noised for the next call if there is one; computed in float32."""
        if self.steps_made == 0:
            self.seeds = [_seed_of(row) for row in sample]
        a, s = self._level(self.steps_made)
        x = self.scale_model_input(sample.float())
        x0 = clean(self.config.prediction_type, model_output.float(), x, a, s)
        self.steps_made += 1
        following = x0
        if self.steps_made < len(self.levels):
            noise = self._noise_after(x, x0, a, s)
            a, s = self._level(self.steps_made)
            following = a * x0 + s * noise
        drawn, x0 = following.to(sample.dtype), x0.to(sample.dtype)
        return StepOutput(drawn, drawn, x0) if return_dict else (drawn, x0)

    def _noise_after(self, x: Tensor, x0: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Return the noise of the next call, of an input ``x = a x0 + s eps`` and its clean estimate."""
        return self._noise(x)

    def _level(self, call: int) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``s`` of a call."""
        a, s = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in self.levels[call][:2])
        return a, s

    def _noise(self, like: Tensor) -> Tensor:
        """Return the fresh noise of all rows for the next call, fp32."""
        generator, rows = torch.Generator("cpu"), []
        for seed in self.seeds:
            generator.manual_seed(seed + self.steps_made)
            rows.append(torch.randn(like.shape[1:], generator=generator, device="cpu", dtype=torch.float32))
        return torch.stack(rows).to(like.device)


class TrajectoryScheduler(SIMFewStepScheduler):
    """Draws in as many network calls as a student of trajectories was trained for, each with the noise that it finds.

    ``x_{i+1} = a_{i+1} x0_i + s_{i+1} (x_i - a_i x0_i) / s_i``, so that nothing is drawn after the initial noise.
    Timesteps, sigmas and the number of steps of a call are ignored.
    """

    def _noise_after(self, x: Tensor, x0: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Return the noise that the clean estimate finds in the call's input."""
        return (x - a * x0) / s


def _seed_of(row: Tensor) -> int:
    """Return a seed that depends on the numbers of a row alone."""
    numbers = row.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(numbers).digest()[:7], "big")

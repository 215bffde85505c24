"""Text pipelines of no family whose calls take no time, for tests that make very many."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


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

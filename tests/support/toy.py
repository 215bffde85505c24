"""A small pipeline whose loop can be given the habits of unknown pipelines."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor


class ToyNetwork(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        shift = (encoder_hidden_states.mean(1) + timestep.reshape(-1, 1) / 1000)[:, :, None, None]
        return (self.mix(hidden_states).tanh() + shift + (0 if residual is None else residual),)


class ToyPipeline(DiffusionPipeline):
    """A pipeline whose loop has the habit that ``does`` names."""

    def __init__(self, transformer: Any, controlnet: Any, refiner: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, controlnet=controlnet, refiner=refiner, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 6,
        does: str = "plain",
        generator: Any = None,
        output_type: str = "latent",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
    ) -> Any:
        if does == "pixels only" and output_type == "latent":
            raise ValueError("`output_type` must be one of `pt` or `np`.")
        self.scheduler.set_timesteps(num_inference_steps)
        if does == "edited levels":  # with inpainting, which keeps it in its own loop
            self.scheduler.sigmas[-1] = self.scheduler.sigmas[-2]
        second = copy.deepcopy(self.scheduler) if does == "second stream" else None
        latents = randn_tensor((len(prompt_embeds), 4, 4, 4), generator=generator)
        for i, t in enumerate(self.scheduler.timesteps):
            x, time, extra = self._inputs(does, i, t, latents, prompt_embeds)
            network = self.refiner if does == "two networks" and i > 2 else self.transformer
            predict = functools.partial(_predict, network, x, time, extra)
            positive, negative = _branches(does, i, predict, x, time, prompt_embeds, negative_prompt_embeds)
            out = _combine(does, i, guidance_scale, positive, negative)
            if does == "perturbed":
                out = out + 0.5 * (positive - predict(0.5 * prompt_embeds))
            by_index = {} if does in ("step by index", "step by index, inpainting") else {"return_dict": False}
            latents = self.scheduler.step(out[:, :, :4], t, latents, **by_index)[0]
            if second is not None:  # which stands at the same time
                second.step(out, t, latents, return_dict=False)
                latents[:, :, 0] = second.step_index
            if does in ("inpainting", "edited levels", "step by index, inpainting"):
                latents[:, :, 0] = 0.0
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, i, t, tensors).pop("latents", latents)
        return {"latents": latents}

    def _inputs(
        self, does: str, i: int, t: torch.Tensor, latents: torch.Tensor, embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return the network's latents, time and further arguments at step ``i``."""
        batch, time = len(latents), t.expand(len(latents))
        extra: dict[str, Any] = {}
        if does == "controlnet":
            extra["residual"] = self.controlnet(latents, time, embeds, return_dict=False)[0]
        if does == "residual":
            extra["residual"] = torch.full((batch, 4, 1, 1), 0.1 * i)
        if does == "squared time":
            time = time**2 / 1000
        if does == "no time":
            time = torch.full((batch,), 500.0)
        x = latents * 2 if does == "scaled latents" else latents
        if does == "taller":
            x = torch.cat([latents, latents[:, :, :1]], dim=2)
        return x, time, extra


def _branches(
    does: str, i: int, predict: Any, x: torch.Tensor, time: torch.Tensor, embeds: torch.Tensor, negative: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positive and the negative prediction, called in the order of the loop's habit."""
    if does == "joint, positive first":
        first, second = predict(torch.cat([embeds, negative]), torch.cat([x] * 2), time.repeat(2)).chunk(2)
        return first, second
    if does == "truncated" and i > 3:
        single = predict(embeds)
        return single, single
    if does == "negative first":
        first, second = predict(negative), predict(embeds)
        return second, first
    return predict(embeds), predict(negative)


def _combine(does: str, i: int, scale: float, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return the guided prediction by the loop's habit."""
    if does == "interval":
        scale = scale if i < 4 else 1.5
    out = negative + scale * (positive - negative)
    if does == "weighted":
        out = scale * positive - (scale - 1) * negative
    if does == "halves":
        out = 0.5 * negative + (0.5 - scale) * negative + scale * positive
    if does == "blend":
        out = 0.25 * negative + 0.75 * positive
    if does == "rescaled":
        out = 0.9 * out
    if does == "rescaled in place":
        out = positive.mul_(0.9)
    return out.clamp(-1, 1) if does == "clipped" else out


def _predict(
    network: Any, x: torch.Tensor, time: Any, extra: dict[str, Any], embeds: torch.Tensor, *others: torch.Tensor
) -> torch.Tensor:
    x, time = others or (x, time)
    return network(x, time, embeds, **extra, return_dict=False)[0]


def make() -> ToyPipeline:
    torch.manual_seed(0)
    networks = [ToyNetwork().eval() for _ in range(3)]
    pipe = ToyPipeline(*networks, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(does: str = "plain", batch: int = 2, **changes: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    positive, negative = (torch.randn(batch, 5, 4, generator=draw) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "does": does,
        "generator": generator,
    } | changes

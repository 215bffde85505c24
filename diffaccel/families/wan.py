"""Wan 2.1 and 2.2 (text to video): velocity, two-call guidance, one network or two that share the noise levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family


class Wan(Family):
    """Wan; its latents are fp32.

    In the 14B pair of Wan 2.2 ``transformer`` has the timesteps from ``boundary_ratio`` up and ``transformer_2`` those
    below, each with its own guidance scale. The time of Wan 2.2 5B is given once per token.
    """

    name = "wan"
    pipelines = ("WanPipeline",)
    other_denoisers = ("transformer_2",)
    row_args = ("encoder_hidden_states",)
    shared_args = ("attention_kwargs",)
    checked_multiple = 16
    rounds = True
    joint_branches = False  # positive first, then negative
    callback_args = {"prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012
    negative_callback_args = {"negative_prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012

    def network(self, pipe: Any, timestep: Tensor) -> Any:
        return pipe.transformer if self._is_high(pipe, timestep) else pipe.transformer_2

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        if not pipe.do_classifier_free_guidance:
            return None
        high, second = timestep is None or self._is_high(pipe, timestep), arguments["guidance_scale_2"]
        # of the call, since a callback switches it off but does not change it
        return float(arguments["guidance_scale"] if high or second is None else second)

    def _is_high(self, pipe: Any, timestep: Tensor) -> bool:
        """Return whether the timestep belongs to the first network; syncs with the device, as the stock loop does."""
        if pipe.config.boundary_ratio is None:
            return True
        high = timestep >= pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
        if bool(high.any()) != bool(high.all()):
            raise DiffAccelError(
                f"Rows on both sides of the boundary between the two networks of {type(pipe).__name__} (timesteps "
                f"{timestep.tolist()}) were asked for in one call. Ask for them in two."
            )
        return bool(high.all())

    def input_dtype(self, session: Any) -> torch.dtype:
        return session.denoiser.dtype

    def time(self, pipe: Any, timestep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        rows = timestep.expand(len(x))
        if not pipe.config.expand_timesteps:
            return rows
        tokens = x[0, 0, :, ::2, ::2].numel()
        return rows.to(torch.float32)[:, None].expand(-1, tokens)

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        return int(arguments["height"]), int(arguments["width"])

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        config = pipe.vae.config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1, 1).to(x0.device, pipe.vae.dtype)
            for values in (config.latents_mean, config.latents_std)
        )
        # the reciprocal of the reciprocal, as the pipeline computes it, for equality to the bit
        return pipe.vae.decode(x0.to(pipe.vae.dtype) / (1.0 / std) + mean, return_dict=False)[0]

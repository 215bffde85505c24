"""A family for a pipeline that none is listed for, identified by watching its own call (no network is evaluated).

The facts that a listed family declares are inferred here: which network, which arguments hold latents, time and rows,
and how predictions are combined. Latents stay in the pipeline's own layout, packed or not. A call at another size is
watched anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaccel import schedules
from diffaccel.errors import UnsupportedBySampler, size_text
from diffaccel.families.base import Family, vae_factor
from diffaccel.families.conditioning import Conditioning
from diffaccel.families.generic.findings import Findings, read_guidance_settings
from diffaccel.families.generic.latents_rule import CONDITION
from diffaccel.families.generic.row_layout import join_layout, map_layout
from diffaccel.families.generic.study import study
from diffaccel.families.generic.watching import NotIdentified, Turn
from diffaccel.modules.stand_in import StandIn, TextMemo, signature_of


class Outdated(Exception):
    """Findings of an earlier call do not hold for this one."""


class Generic(Family):
    """The family inferred from one call of one pipeline; valid for that call, also with other prompts."""

    name = "generic"
    pipelines = ()
    draws_pixels = False

    def __init__(self, findings: Findings, pipe: Any, arguments: dict[str, Any]) -> None:
        self.findings, self.pipeline = findings, type(pipe).__name__
        self.numbers = _numbers(arguments)
        # attributes of the instance, where a listed family has class attributes
        self.__dict__.update(
            denoiser=findings.denoiser,
            latent_arg=findings.latents.arg,
            time_arg=findings.time_arg,
            joint_branches=findings.latents.copies == 2,
            negative_first=findings.guidance.positive == 1,
        )

    def check_first_step(
        self, pipe: Any, calls: list[dict[str, Any]], answers: list[Any], guided: Any, latents: Any, timestep: Any
    ) -> None:
        """Raise where findings of an earlier call do not hold for a recorded first step.

        Raises:
            Outdated: with the reason.
        """
        scheduler = pipe.scheduler
        time = scheduler.timesteps[schedules.start_index(scheduler, timestep)]
        scale = getattr(scheduler, "scale_model_input", None)
        try:
            if read_guidance_settings(pipe) != self.findings.guidance_settings:
                raise NotIdentified("its guidance has other settings.")
            turn = Turn(self.denoiser, self.pipeline, calls, answers, guided, latents, time)
            if scale is not None:  # a call that was watched did not scale
                turn.sample = scale(latents, timestep)
            self.findings.check_again(turn)
        except Exception as reason:  # a turn of another form altogether
            raise Outdated(str(reason)) from reason

    @property
    def is_exact(self) -> bool:
        """Whether the inferred rules give the pipeline's own numbers to the bit, and not only up to rounding."""
        return self.findings.guidance.exact and self.findings.time.exact

    def network(self, pipe: Any, timestep: Tensor) -> Any:
        module = getattr(pipe, self.denoiser)
        return StandIn(module, functools.partial(self._evaluate, module))

    def _evaluate(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """Call the network on latents in the pipeline's layout, and return its signed prediction in that layout."""
        findings, condition = self.findings, kwargs.pop(CONDITION, None)
        positional = list(signature_of(module).parameters)[1 : 1 + len(args)] if args else []
        arguments = {**dict(zip(positional, args, strict=True)), **kwargs}
        x = arguments[self.latent_arg]
        arguments[self.latent_arg] = findings.latents.pack(x, condition)
        out = module(*[arguments.pop(name) for name in positional], **arguments)
        out = out if isinstance(out, Tensor) else out[0]  # Kandinsky's returns a tensor, others a tuple
        is_list = isinstance(out, list | tuple)
        out = torch.stack(list(out)).reshape(x.shape) if is_list else findings.predicted_part(out)
        if out.shape != x.shape:
            problem = f"The network returns {tuple(out.shape)} for latents {tuple(x.shape)}."
            raise self._needs_family(problem, "Use diffaccel.remove(pipe).")
        # a loop whose latents have a wider dtype than the network combines its predictions in the wider one
        out = out.to(torch.promote_types(out.dtype, findings.dtype))
        return (out if findings.guidance.sign > 0 else -out,)

    def input_dtype(self, session: Any) -> torch.dtype:
        return self.findings.latents.dtype

    def output_shape(self, network: Any, like: Any) -> tuple[int, ...]:
        return (len(like), *self.findings.answer_shape)

    def time(self, pipe: Any, timestep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.findings.time(timestep).expand(len(x)).to(x.device)

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        changed = {k for k, _ in self.numbers.items() ^ _numbers(arguments).items()}
        if changed:
            problem = f"Another conditioning changes {', '.join(sorted(changed))}."
            raise self._needs_family(problem, "Change prompts only, or give the call itself these values.")
        if read_guidance_settings(pipe) != self.findings.guidance_settings:
            raise self._needs_family("Its guidance was changed during the call, by a callback?", "Leave it as it was.")
        return self.findings.guidance.scale

    def combine(self, pipe: Any, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        return self.findings.guidance.combine(negative, positive, scale)

    def is_linear(self, pipe: Any) -> bool:
        """Return False: the rule was fitted, so that no declared one has to be checked."""
        return False

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        side = getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 1)
        side = side if isinstance(side, int) else 0
        return int(arguments.get("height") or side), int(arguments.get("width") or side)

    def grid(self, pipe: Any) -> int:
        return 1

    def check_size(self, pipe: Any, height: int, width: int) -> None:
        """Leave the check to the pipeline, whose call's size is the only one."""

    def multiple(self, pipe: Any) -> int:
        """Return twice what a latent or a patch of them covers: what is known to be drawn is the call's own size."""
        return 2 * vae_factor(pipe) * self.patch(pipe)

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        if arguments.get("height") and arguments.get("width"):
            return {"height": height, "width": width}
        problem = f"The sampler asks for {size_text(height, width)}, and the call leaves its own size out."
        raise self._needs_family(problem, "Pass height and width.")

    def of_call(self, pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo) -> Family:
        """Return the family of the call, which is watched where it has another size."""
        if all(arguments.get(side) == self.numbers.get(side) for side in ("height", "width")):
            return self
        try:
            return identify(pipe, call, arguments, memo)
        except NotIdentified as reason:
            size = size_text(arguments["height"], arguments["width"])
            raise self._needs_family(f"At {size} its call was not followed: {reason}", "Use one size.") from reason

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        raise self._needs_family("The sampler asks for pixels between steps.", "Use one that works on latents.")

    def encode(self, pipe: Any, pixels: Tensor) -> Tensor:
        raise self._needs_family("The sampler asks for latents of pixels.", "Use one that works on latents.")

    def _needs_family(self, problem: str, fix: str) -> UnsupportedBySampler:
        reason = "no family describes this pipeline, so the layout of its latents and its options are unknown"
        return UnsupportedBySampler(f"{self.pipeline}: {problem} That is not possible, since {reason}. {fix}")

    def conditioning(self, pipe: Any, calls: list[dict[str, Any]], arguments: dict[str, Any]) -> Conditioning:
        findings = self.findings
        kwargs = [findings.constant_arguments(call) for call in calls]
        if [set(branch) for branch in kwargs] != [set(branch) for branch in findings.constants]:
            raise self._needs_family(
                "Another conditioning calls the network with other arguments.",
                "Give it a negative prompt, masks and so on just where the call has them.",
            )
        if findings.guidance.scale is None:
            return Conditioning(kwargs[0], None, None, arguments)
        if not self.joint_branches:
            index = findings.guidance.positive
            return Conditioning(kwargs[index], kwargs[1 - index], None, arguments)
        negative, positive = (
            self.map_rows(kwargs[0], lambda rows, i=i: self.branches(rows)[i])  # type: ignore[misc]
            for i in (0, 1)
        )
        return Conditioning(positive, negative, kwargs[0], arguments)

    def map_rows(self, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {k: map_layout(v, self.findings.rows.get(k), change) for k, v in kwargs.items()}

    def join_rows(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: join_layout([part[k] for part in parts], self.findings.rows.get(k)) for k in parts[0]}


def _numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if isinstance(v, bool | int | float)}


def identify(pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo | None = None) -> Generic:
    """Infer the family of one call of a pipeline that none is listed for, by watching ``call``.

    Args:
        arguments: the call's, by name, defaults filled in.
        memo: caches text encodings for the call itself.

    Raises:
        NotIdentified: with the reason, when the native driver cannot follow the pipeline.
    """
    callback, inputs = arguments.get("callback_on_step_end"), arguments.get("callback_on_step_end_tensor_inputs")
    needs_others = set(getattr(callback, "tensor_inputs", None) or inputs or ()) - {"latents"}
    if arguments.get("callback") is not None or (callback is not None and needs_others):
        raise NotIdentified("its step callback asks for more than the latents.")
    return Generic(study(pipe, call, arguments, memo or TextMemo()), pipe, arguments)

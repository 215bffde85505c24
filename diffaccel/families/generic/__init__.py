"""A pipeline that no family describes, identified by watching its own call (no network is evaluated).

What a listed family declares is found here: which network, which arguments hold latents, time and rows, and how
predictions are joined. Latents stay in the pipeline's own layout, packed or not, and at the call's resolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import UnsupportedBySampler
from diffaccel.families.base import Family
from diffaccel.families.conditioning import Conditioning
from diffaccel.families.generic.findings import Findings
from diffaccel.families.generic.latents_rule import CONDITION
from diffaccel.families.generic.row_layout import join_layout, map_layout
from diffaccel.families.generic.study import study
from diffaccel.families.generic.watching import NotIdentified
from diffaccel.modules.stand_in import StandIn, TextMemo


class Generic(Family):
    """What was found about one call of one pipeline; good for that call and other prompts in it."""

    name = "generic"
    pipelines = ()

    def __init__(self, found: Findings, pipe: Any, arguments: dict[str, Any]) -> None:
        self.found, self.pipeline = found, type(pipe).__name__
        self.numbers = _numbers(arguments)
        # of this call, where a listed family has them of its class
        self.__dict__.update(
            denoiser=found.denoiser,
            latent_arg=found.latents.arg,
            time_arg=found.time_arg,
            joint_branches=found.latents.copies == 2,
            negative_first=found.guidance.positive == 1,
        )

    def network(self, pipe: Any, timestep: Tensor) -> Any:
        module = getattr(pipe, self.denoiser)
        return StandIn(module, functools.partial(self._evaluate, module))

    def _evaluate(self, module: Any, **kwargs: Any) -> tuple[Tensor]:
        """Call the network on latents in the pipeline's layout, and return its signed prediction in it."""
        found, x, condition = self.found, kwargs.pop(self.latent_arg), kwargs.pop(CONDITION, None)
        out = module(**{self.latent_arg: found.latents.pack(x, condition)}, **kwargs)
        out = out if isinstance(out, Tensor) else out[0]  # Kandinsky's returns it bare
        out = torch.stack(list(out)).reshape(x.shape) if isinstance(out, list | tuple) else found.cut(out)
        if out.shape != x.shape:
            got, due = tuple(out.shape), tuple(x.shape)
            raise self._needs_family(f"The network returns {got} for latents {due}.", "Use diffaccel.remove(pipe).")
        # loops that keep their latents wider than the network join its predictions so, too
        out = out.to(torch.promote_types(out.dtype, found.dtype))
        return (out if found.guidance.sign > 0 else -out,)

    def input_dtype(self, session: Any) -> torch.dtype:
        return self.found.latents.dtype

    def output_shape(self, network: Any, like: Any) -> tuple[int, ...]:
        return (len(like), *self.found.answer_shape)

    def time(self, pipe: Any, timestep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.found.time(timestep).expand(len(x)).to(x.device)

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        changed = {k for k, _ in self.numbers.items() ^ _numbers(arguments).items()}
        if changed:
            what = f"Another conditioning changes {', '.join(sorted(changed))}."
            raise self._needs_family(what, "Change prompts only, or give the call itself these values.")
        if self.found.knobs(pipe) != self.found.turned:
            raise self._needs_family("Its guidance was changed during the call, by a callback?", "Leave it as it was.")
        return self.found.guidance.scale

    def combine(self, pipe: Any, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        return self.found.guidance.combine(negative, positive, scale)

    def is_linear(self, pipe: Any) -> bool:
        """False: the rule was found by the check that a declared one would now undergo."""
        return False

    def size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        side = getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 1)
        side = side if isinstance(side, int) else 0
        return int(arguments.get("height") or side), int(arguments.get("width") or side)

    def check_size(self, pipe: Any, height: int, width: int) -> None:
        """The pipeline checks its own call's."""

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        asked = f"The sampler asks for {height}x{width} besides the call's own size."
        raise self._needs_family(asked, "Use a sampler that keeps the resolution.")

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        raise self._needs_family("The sampler asks for pixels between steps.", "Use one that works on latents.")

    def _needs_family(self, what: str, fix: str) -> UnsupportedBySampler:
        why = "no family describes this pipeline, so the layout of its latents and its options are unknown"
        return UnsupportedBySampler(f"{self.pipeline}: {what} That is not possible, since {why}. {fix}")

    def conditioning(self, pipe: Any, calls: list[dict[str, Any]], arguments: dict[str, Any]) -> Conditioning:
        found = self.found
        kept = [found.kept(call) for call in calls]
        if [set(k) for k in kept] != [set(k) for k in found.constants]:
            what = "Another conditioning calls the network with other arguments."
            raise self._needs_family(what, "Give it a negative prompt, masks and so on just where the call has them.")
        if found.guidance.scale is None:
            return Conditioning(kept[0], None, None, arguments)
        if not self.joint_branches:
            positive = found.guidance.positive
            return Conditioning(kept[positive], kept[1 - positive], None, arguments)
        negative, positive_kwargs = (
            self.map_rows(kept[0], lambda rows, i=i: self.branches(rows)[i])  # type: ignore[misc]
            for i in (0, 1)
        )
        return Conditioning(positive_kwargs, negative, kept[0], arguments)

    def map_rows(self, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {k: map_layout(v, self.found.rows.get(k), change) for k, v in kwargs.items()}

    def join_rows(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: join_layout([part[k] for part in parts], self.found.rows.get(k)) for k in parts[0]}


def _numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if isinstance(v, bool | int | float)}


def identify(pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo | None = None) -> Generic:
    """The family of one call of a pipeline that none is listed for, found by watching ``call``.

    Args:
        arguments: the call's, by name, defaults filled in.
        memo: keeps text encodings for the call itself.

    Raises:
        NotIdentified: with the reason, when the native driver cannot follow the pipeline.
    """
    callback, asked = arguments.get("callback_on_step_end"), arguments.get("callback_on_step_end_tensor_inputs")
    asked = set(getattr(callback, "tensor_inputs", None) or asked or ()) - {"latents"}
    if arguments.get("callback") is not None or (callback is not None and asked):
        raise NotIdentified("its step callback asks for more than the latents.")
    return Generic(study(pipe, call, arguments, memo or TextMemo()), pipe, arguments)

"""Guidance branches of a family: their scale, their order in a joint call, and their conditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families import rows
from diffaccel.families.conditioning import Conditioning


class Guided:
    """The guidance part of a :class:`~diffaccel.families.base.Family`.

    Class attributes:
        name: short name used in messages and records.
        latent_arg, time_arg: the network's argument names for latents and time.
        row_args: network arguments with one row per sample, dotted into dicts, every tensor of a list included.
        shared_args: further known arguments, which are the same for every row.
        joint_branches: whether negative and positive rows go through one network call.
        negative_first: whether the negative rows come first in it.
    """

    name: ClassVar[str]
    latent_arg: ClassVar[str] = "hidden_states"
    time_arg: ClassVar[str] = "timestep"
    row_args: ClassVar[tuple[str, ...]] = ()
    shared_args: ClassVar[tuple[str, ...]] = ()
    joint_branches: ClassVar[bool] = True
    negative_first: ClassVar[bool] = True

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        """Return the guidance scale, or None when only the positive branch is evaluated.

        It is read from the pipeline at every step, since callbacks may switch guidance off during a call.

        Args:
            timestep: the schedule's, where the scale depends on it; None for the first of a call.
        """
        return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None

    def combine(self, pipe: Any, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Return the guided prediction, ``negative + scale (positive - negative)`` (arXiv 2207.12598)."""
        return negative + scale * (positive - negative)

    def branches(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negative and the positive rows of a joint call."""
        first, second = both.chunk(2)
        return (first, second) if self.negative_first else (second, first)

    def join_branches(self, negative: dict[str, Any], positive: dict[str, Any]) -> dict[str, Any]:
        """Return the network's arguments of a joint call."""
        return self.join_rows([negative, positive] if self.negative_first else [positive, negative])

    def is_linear(self, pipe: Any) -> bool:
        """Return whether the guided output is linear as in :meth:`combine` above, which the probe then checks."""
        return True

    def refuse(self, arguments: dict[str, Any]) -> None:
        """Raise for call arguments whose rule depends on the step index, which a sampler's own steps do not share."""

    def conditioning(self, pipe: Any, calls: list[dict[str, Any]], arguments: dict[str, Any]) -> Conditioning:
        """Sort what the pipeline passed to its network in one step into branches."""
        understood = {self.latent_arg, self.time_arg, "return_dict", *self.shared_args}
        understood |= {name.split(".")[0] for name in self.row_args}
        for call in calls:
            unknown = [name for name, value in call.items() if value is not None and name not in understood]
            if unknown:
                raise DiffAccelError(
                    f"{type(pipe).__name__} passed {', '.join(unknown)} to its network, which the {self.name} family "
                    "cannot follow. Call without the option that causes it, or diffaccel.remove(pipe)."
                )
        kwargs = [{k: v for k, v in call.items() if k not in (self.latent_arg, self.time_arg)} for call in calls]
        is_guided = self.guidance_scale(pipe, arguments) is not None
        if not is_guided:
            return Conditioning(kwargs[0], None, None, arguments)
        if self.joint_branches:
            negative, positive = (
                self.map_rows(kwargs[0], lambda tensor, i=i: self.branches(tensor)[i])  # type: ignore[misc]
                for i in (0, 1)
            )
            return Conditioning(positive, negative, kwargs[0], arguments)
        return Conditioning(kwargs[0], kwargs[1], None, arguments)

    def map_rows(self, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return ``kwargs`` with ``change`` applied to every tensor that has one row per sample."""
        return rows.map_rows(kwargs, self.row_args, change)

    def join_rows(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Join several sets of network arguments, rows concatenated in order."""
        return rows.join_rows(parts, self.row_args)


def true_cfg_scale(arguments: dict[str, Any]) -> float | None:
    """Return the scale of guidance beside an embedded one; it takes a negative prompt and ``true_cfg_scale`` > 1."""
    has_negative = arguments.get("negative_prompt") is not None or (
        arguments.get("negative_prompt_embeds") is not None
        and arguments.get("negative_pooled_prompt_embeds") is not None
    )
    scale = float(arguments["true_cfg_scale"])
    return scale if scale > 1 and has_negative else None

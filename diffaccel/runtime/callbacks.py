"""A user's ``callback_on_step_end`` under a sampler, with the stock loop's own contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.session import Session


@dataclass
class Callback:
    """A user's function and the names of the tensors that it asks for."""

    function: Any
    inputs: Sequence[str]

    def __call__(self, session: Session, index: int, timestep: Tensor, latents: Callable[[], Tensor]) -> Tensor | None:
        """Call the function after a step; return latents if it changed them. Other tensors are replaced in place."""
        family, cond = session.family, session.conds[0]
        offered = self._tensors(session, latents)
        before = dict(offered)  # the function may change the dict
        returned = self.function(session.pipe, index, timestep, offered) or {}
        edited_latents = None
        for name, value in returned.items():
            if value is before.get(name):
                continue
            if name == "latents":
                edited_latents = value
            elif name in family.callback_args:
                _replace(family, cond, family.callback_args[name], value)
        return edited_latents

    def _tensors(self, session: Session, latents: Callable[[], Tensor]) -> dict[str, Any]:
        """Return the tensors that the function asks for, by name."""
        family, cond = session.family, session.conds[0]
        kwargs = cond.joint if cond.joint is not None else cond.positive
        tensors: dict[str, Any] = {}
        for name in self.inputs:
            if name == "latents":
                tensors[name] = latents()
            elif name in family.callback_args:
                tensors[name] = _get(kwargs, family.callback_args[name])
            else:
                raise DiffAccelError(
                    f"callback_on_step_end asked for '{name}', which has no meaning under a sampler of diffaccel. "
                    f"It may ask for: latents, {', '.join(family.callback_args)}."
                )
        return tensors


def _get(kwargs: dict[str, Any], dotted: str) -> Any:
    name, _, inner = dotted.partition(".")
    return kwargs[name][inner] if inner else kwargs[name]


def _replace(family: Any, cond: Any, dotted: str, value: Tensor) -> None:
    """Set a callback's new tensor for both branches where it has the rows of both, else for the positive one."""
    name, _, inner = dotted.partition(".")

    def put(kwargs: dict[str, Any], tensor: Tensor) -> None:
        kwargs[name] = {**kwargs[name], inner: tensor} if inner else tensor

    if cond.joint is not None and len(value) == len(_get(cond.joint, dotted)):
        put(cond.joint, value)
        negative, positive = family.branches(value)
        put(cond.negative, negative)
        put(cond.positive, positive)
    else:
        put(cond.positive, value)

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
    """A user's function and the tensors it asked for."""

    function: Any
    inputs: Sequence[str]

    def __call__(self, session: Session, index: int, timestep: Tensor, latents: Callable[[], Tensor]) -> Tensor | None:
        """Show a finished step; returns latents if the function changed them. Other tensors are changed in place."""
        family, cond = session.family, session.conds[0]
        kept = cond.joint if cond.joint is not None else cond.positive
        offered: dict[str, Any] = {}
        for name in self.inputs:
            if name == "latents":
                offered[name] = latents()
            elif name in family.callback_args:
                offered[name] = _get(kept, family.callback_args[name])
            else:
                raise DiffAccelError(
                    f"callback_on_step_end asked for '{name}', which has no meaning under a sampler of diffaccel. "
                    f"It may ask for: latents, {', '.join(family.callback_args)}."
                )
        given = dict(offered)
        returned = self.function(session.pipe, index, timestep, offered) or {}
        edited = None
        for name, value in returned.items():
            if value is given.get(name):
                continue
            if name == "latents":
                edited = value
            elif name in family.callback_args:
                _replace(family, cond, family.callback_args[name], value)
        return edited


def _get(kwargs: dict[str, Any], dotted: str) -> Any:
    name, _, inner = dotted.partition(".")
    return kwargs[name][inner] if inner else kwargs[name]


def _replace(family: Any, cond: Any, dotted: str, value: Tensor) -> None:
    """A callback's new tensor, for both branches when it has their rows, else for the positive one."""
    name, _, inner = dotted.partition(".")

    def put(kwargs: dict[str, Any], new: Tensor) -> None:
        kwargs[name] = {**kwargs[name], inner: new} if inner else new

    if cond.joint is not None and len(value) == len(_get(cond.joint, dotted)):
        put(cond.joint, value)
        negative, positive = family.branches(value)
        put(cond.negative, negative)
        put(cond.positive, positive)
    else:
        put(cond.positive, value)

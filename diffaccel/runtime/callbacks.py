"""A user's ``callback_on_step_end`` under a sampler, with the stock loop's own contract."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.runtime.probe import stock_call
from diffaccel.session import Session


@dataclass
class Callback:
    """A user's function and the names of the tensors that it asks for.

    Attributes:
        joined: negative tensors by name, which the pipeline joined to the positive ones before its loop: changes are
            shown at the next step and have no effect on the network.
        replaced: number of tensors that the function has returned in the place of others, latents apart.
    """

    function: Any
    inputs: Sequence[str]
    joined: dict[str, Any] = field(default_factory=dict)
    replaced: int = 0

    def check(self, session: Session) -> None:
        """Raise for a tensor that the function asks for and that no sampler can show."""
        allowed = session.family.callback_names()
        for name in self.inputs:
            if name not in allowed:
                raise DiffAccelError(
                    f"callback_on_step_end asked for '{name}', which has no meaning under a sampler of diffaccel. "
                    f"It may ask for: {', '.join(allowed)}."
                )

    def __call__(
        self, sessions: Sequence[Session], stage: int, index: int, timestep: Tensor, latents: Callable[[], Tensor]
    ) -> Tensor | None:
        """Call the function after a step; return latents if it changed them. Other tensors are replaced in place.

        The latents that it sees are a copy of the sampler's; they may be changed in place, as those of a stock loop.
        Under a sampler with several resolutions they have that of the stage, and the function is also given ``stage``
        and ``resolution``, height and width in pixels.

        Args:
            sessions: those of all stages, in order; one for a sampler without stages.
            stage: index of the present one.
        """
        session = sessions[stage]
        offered: dict[str, Any] = {
            name: latents() if name == "latents" else self._tensor(session, name) for name in self.inputs
        }
        if len(sessions) > 1:
            offered |= {"stage": stage, "resolution": (session.height, session.width)}
        before = dict(offered)  # the function may change the dict
        shown = before.get("latents")
        was_edited = edit_detector(shown)
        returned = self._taken(session, self.function(session.pipe, index, timestep, offered))
        for name, value in returned.items():
            if name != "latents" and value is not before.get(name):
                self.replaced += 1
                for each in dict.fromkeys(sessions):
                    self._take(each, name, value)
        latents_now = returned.get("latents", shown)
        if latents_now is shown:
            return latents_now if was_edited() else None
        return _like(latents_now, latents() if shown is None else shown)

    def _taken(self, session: Session, returned: Any) -> dict[str, Any]:
        """Return what the function returned, less out of its own dict what the loop takes, as a stock loop does.

        Raises:
            DiffAccelError: for anything but a dict, or nothing.
        """
        if returned is None:
            return {}
        if not isinstance(returned, MutableMapping):
            raise DiffAccelError(
                f"callback_on_step_end returned an object of the class {type(returned).__name__}; it must return a "
                "dict of tensors by name, such as {'latents': latents}, or {}."
            )
        values = dict(returned)
        for name in ("latents", *session.family.callback_args, *session.family.negative_callback_args):
            returned.pop(name, None)
        return values

    def show(self, session: Session, index: int, timestep: Tensor, latents: Tensor, more: dict[str, Any]) -> None:
        """Call the function between steps, with latents that are not the loop's: what it returns has no effect."""
        offered = {n: latents if n == "latents" else self._tensor(session, n) for n in self.inputs}
        self.function(session.pipe, index, timestep, offered | more)

    def _tensor(self, session: Session, name: str) -> Any:
        """Return a tensor of the conditioning that the function asks for."""
        family, cond = session.family, session.conds[0]
        if name in family.callback_args:
            return _get(cond.positive if cond.joint is None else cond.joint, family.callback_args[name])
        if cond.negative is None:
            return cond.arguments.get(name)
        negative = _get(cond.negative, family.negative_callback_args[name])
        return self.joined.setdefault(name, negative.clone()) if family.joint_branches else negative

    def _take(self, session: Session, name: str, value: Any) -> None:
        """Put a tensor that the function returned, asked for or not, where the network finds it.

        Raises:
            DiffAccelError: for a tensor that the pipeline's own loop would use and a sampler cannot.
        """
        family, cond = session.family, session.conds[0]
        if name in family.callback_args:
            _replace(family, cond, family.callback_args[name], value)
        elif name in family.negative_callback_args:
            if family.joint_branches:
                self.joined[name] = value
            elif cond.negative is not None:
                _put(cond.negative, family.negative_callback_args[name], value)
        elif _is_taken_by_loop(session.pipe, name):  # others are dropped by the stock loop too
            allowed = ", ".join(family.callback_names())
            raise DiffAccelError(
                f"callback_on_step_end returned '{name}', which a sampler cannot take over in "
                f"{type(session.pipe).__name__}: allowed are {allowed}. {_fix(session.pipe, family, name)}"
            )


def _like(returned: Any, latents: Tensor) -> Tensor:
    """Return latents that a function returned, in all rows; raise for what cannot take the place of ``latents``."""
    got = f"of type {type(returned).__name__}"
    if isinstance(returned, Tensor):
        got = f"of shape {tuple(returned.shape)}"
        with contextlib.suppress(RuntimeError):
            return returned.expand(latents.shape)
    raise DiffAccelError(
        f"callback_on_step_end returned latents {got}; under a sampler they are a tensor of the shape "
        f"{tuple(latents.shape)}. Return such a tensor, or leave latents out."
    )


def _is_taken_by_loop(pipe: Any, name: str) -> bool:
    """Return whether a pipeline's own loop takes over a tensor of this name from its callback.

    Some loops take more than the pipeline lists; those mention the name.
    """
    if name in getattr(pipe, "_callback_tensor_inputs", ()):
        return True
    try:
        return f'"{name}"' in inspect.getsource(inspect.unwrap(stock_call(type(pipe))))
    except (OSError, TypeError):
        return True


def edit_detector(shown: Tensor | None) -> Callable[[], bool]:
    """Return a function that tells whether a tensor was changed in place since.

    On a GPU torch's count of in-place changes tells, without waiting for the device. On a CPU the values are compared:
    numpy changes memory that they share past that count.
    """
    if shown is None:
        return lambda: False
    if shown.device.type != "cpu" and not shown.is_inference():  # tensors of inference mode have no count
        version = shown._version
        return lambda: shown._version != version
    before = shown.clone()
    return lambda: not torch.equal(shown, before)


def _fix(pipe: Any, family: Any, name: str) -> str:
    if family.name != "generic":
        return "Leave it out, or diffaccel.remove(pipe)."
    if name not in getattr(pipe, "_callback_tensor_inputs", ()):
        return "Leave it out, or use diffaccel.samplers.Scheduler(), which runs the pipeline's own loop."
    return (
        f"Ask for it as well (callback_on_step_end_tensor_inputs=['latents', '{name}']): the call then runs in the "
        "pipeline's own loop, which takes it."
    )


def _get(kwargs: dict[str, Any], dotted: str) -> Any:
    name, _, inner = dotted.partition(".")
    return kwargs[name][inner] if inner else kwargs[name]


def _put(kwargs: dict[str, Any], dotted: str, tensor: Tensor) -> None:
    name, _, inner = dotted.partition(".")
    kwargs[name] = {**kwargs[name], inner: tensor} if inner else tensor


def _replace(family: Any, cond: Any, dotted: str, value: Tensor) -> None:
    """Set a callback's new tensor for both branches where it has the rows of both, else for the positive one."""
    if cond.joint is not None and len(value) == len(_get(cond.joint, dotted)):
        _put(cond.joint, dotted, value)
        negative, positive = family.branches(value)
        _put(cond.negative, dotted, negative)
        _put(cond.positive, dotted, positive)
    else:
        _put(cond.positive, dotted, value)

"""Classes of their own for a network and its temporal modules, which ask the network's tables first.

Names, weights, hooks and adapters stay where they are. A copy, a pickle, a file and a change of weights see the plain
network: what makes one lets go of the tables first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from diffaccel.modules.like_class import like_class, once_a_class

PLACE = "_diffaccel_temporal"
CHANGES = ("fuse_lora", "unfuse_lora")  # of weights, which their versions do not show
READS = (
    "state_dict", "save_pretrained", "load_lora_adapter", "add_adapter", "set_adapters", "set_adapter",
    "delete_adapters", "unload_lora", "load_state_dict", "_apply", "enable_adapters", "disable_adapters",
    "enable_lora", "disable_lora", "train", "requires_grad_", "enable_layerwise_casting",
)  # fmt: skip


class Owner(Protocol):
    """What a network's class asks."""

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the network."""

    def forget_if_changed(self) -> None:
        """Forget the tables where anything that they depend on has changed."""

    def let_go(self, forget: bool) -> None:
        """Put all weights back, and forget the tables where ``forget``."""


@dataclass(eq=False)
class TemporalPlace:
    """Where a temporal module stands.

    Attributes:
        module: which it is.
        original: its own class.
        result: what its calls return while the network is in a call with a table; None otherwise.
    """

    owner: Owner
    module: nn.Module
    original: type
    result: Any = field(default=None)


def take(module: nn.Module, owner: Owner, is_network: bool = False) -> TemporalPlace:
    """Give a module a class that asks ``owner``; :func:`give_back` undoes it."""
    cls: Any = type(module)
    place = vars(module)[PLACE] = TemporalPlace(owner, module, cls)
    module.__class__ = _network_class(cls) if is_network else _module_class(cls)
    return place


def give_back(module: nn.Module) -> None:
    """Give a module its own class again; may be called twice."""
    place: TemporalPlace | None = vars(module).pop(PLACE, None)
    if place is not None:
        module.__class__ = place.original


class Returning:
    """A hook before ``state_dict`` of a module inside of a temporal one: its weights are in their places then."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.owner.let_go(False)

    def __reduce__(self) -> Any:
        """Return what a copy of the module has: a hook that does nothing."""
        return _Idle, ()


class _Idle:
    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Do nothing."""


def is_taken(module: nn.Module) -> bool:
    """Return whether a module has such a class."""
    return PLACE in vars(module)


@once_a_class
def _module_class(cls: Any) -> Any:
    """Return a class of the same name whose forward returns a row of a table, where there is one."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        place: TemporalPlace | None = vars(self).get(PLACE)  # None for a bound method that outlived it
        return cls.forward(self, *args, **kwargs) if place is None or place.result is None else place.result

    return type(cls.__name__, (cls,), {**_names(cls), "forward": forward})


@once_a_class
def _network_class(cls: Any) -> Any:
    """Return a class of the same name whose calls are answered by its owner, outside of hooks and compiled code."""

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        place: TemporalPlace | None = vars(self).get(PLACE)
        return cls.__call__(self, *args, **kwargs) if place is None else place.owner.answer(args, kwargs)

    members = {name: _letting_go(cls, name, True) for name in CHANGES if hasattr(cls, name)}
    members |= {name: _letting_go(cls, name, False) for name in READS if hasattr(cls, name)}
    return like_class(cls, {**_names(cls), **members, "__call__": __call__})


def _letting_go(cls: Any, name: str, forget: bool) -> Any:
    """Return a method of ``cls`` that finds the network's weights in their places."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        place: TemporalPlace | None = vars(self).get(PLACE)
        if place is None:  # made by a class method of this class
            return method(self, *args, **kwargs)
        owner = place.owner
        owner.let_go(forget)
        result = method(self, *args, **kwargs)
        owner.forget_if_changed()  # at once: a cast and its reverse may end at the same addresses
        return result

    return wrapped


def _names(cls: Any) -> dict[str, Any]:
    """Return the members by which a derived class is named, copied and pickled as ``cls``."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        place: TemporalPlace | None = vars(self).get(PLACE)
        if place is not None:
            place.owner.let_go(True)  # which gives temporal modules their own class
        reduced = cls.__reduce_ex__(self, protocol)
        return (_rebuilt, (cls,), reduced[2]) if is_taken(self) else reduced

    return {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": __reduce_ex__}


def _rebuilt(cls: Any) -> Any:
    """Return an empty network of the class that :func:`take` makes of ``cls``."""
    return cls.__new__(_network_class(cls))

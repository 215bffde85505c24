"""A class made over that of a network, which counts as equal to it where others compare classes.

``from_pipe`` of diffusers takes a network only where ``type(network)`` is among the classes that a pipeline names, and
``in`` asks for equality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Like(type):
    """The class of such classes; ``_diffaccel_like`` of one is the class that it counts as."""

    _diffaccel_like: type

    def __eq__(cls, other: object) -> bool:
        return (getattr(other, "_diffaccel_like", other) if isinstance(other, type) else other) is cls._diffaccel_like

    def __hash__(cls) -> int:
        return hash(cls._diffaccel_like)


def like_class(cls: Any, members: dict[str, Any]) -> Any:
    """Return a class over ``cls`` with ``members``, equal to it; one that is not where ``cls`` has a metaclass."""
    if type(cls) not in (type, _Like):
        return type(cls)(cls.__name__, (cls,), members)
    return _Like(cls.__name__, (cls,), {**members, "_diffaccel_like": getattr(cls, "_diffaccel_like", cls)})


def once_a_class(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``make`` with its results kept by the identity of the class, which equal classes do not share."""
    made: dict[int, Any] = {}

    def kept(cls: Any) -> Any:
        if id(cls) not in made:
            made[id(cls)] = make(cls)  # it derives from ``cls``, whose id is thus not given again
        return made[id(cls)]

    return kept

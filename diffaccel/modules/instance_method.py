"""A function in the place of one object's method, which copies of the object do not take along."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any


class InstanceMethod:
    """A callable to be set as the attribute ``name`` of ``owner``, with the signature of the method that it replaces.

    A deep copy of the owner, as calls make of a scheduler for a second stream, gets the method of its class again.

    Args:
        on_copy: called when such a copy is made.
    """

    def __init__(
        self, owner: Any, name: str, function: Callable[..., Any], on_copy: Callable[[], None] | None = None
    ) -> None:
        self._owner, self._name, self._function, self._on_copy = owner, name, function, on_copy
        functools.update_wrapper(self, getattr(owner, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = memo.get(id(self._owner))
        if other is None:
            return self
        if self._on_copy is not None:
            self._on_copy()
        return MethodType(getattr(type(other), self._name), other)

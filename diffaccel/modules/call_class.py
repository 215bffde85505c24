"""A class made for one pipeline, whose ``__call__`` is another; the pipeline is copied and pickled as ever.

``pipe(...)`` looks its ``__call__`` up on the class. Other tools replace it there too, and note what they need on the
class that they find: such a class stays on its pipeline when the methods are taken off, and then passes calls on.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

from diffaccel.modules.guard import alone

_FACTS = "_diffaccel_class"

Call = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class CallClass:
    """The facts about a generated class.

    Attributes:
        original: the class that it derives from.
        call: answers ``pipe(*args, **kwargs)`` as ``call(pipe, stock_call, args, kwargs)``.
        tell: called with the pipeline and a sentence when something is made of it to which ``call`` does not go along.
        keeps: attribute of the pipeline that a copy must have too.
        cls: the generated class.
    """

    def __init__(self, original: type, call: Call, tell: Callable[[Any, str], None], keeps: str) -> None:
        self.original: Any = original
        self.call, self.tell, self.keeps = call, tell, keeps
        members = {"__module__": original.__module__, "__qualname__": original.__qualname__, _FACTS: self}
        self.cls = type(original.__name__, (original,), {**members, **_methods(self)})
        self._members = dict(vars(self.cls))

    def is_outermost(self, pipe: Any) -> bool:
        """Return whether no class was generated over this one."""
        return facts_of(type(pipe)) is self

    def is_changed(self) -> bool:
        """Return whether somebody has set or deleted attributes of the class; copyreg adds a ``__slotnames__``."""
        members = vars(self.cls)
        added = [name for name in members if name not in self._members and not name.startswith("__")]
        return bool(added) or any(members.get(name) is not value for name, value in self._members.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> CallClass:
        return self  # copies within a process share the class

    def __reduce__(self) -> tuple[Any, ...]:
        return CallClass, (stock_class(self.original), self.call, self.tell, self.keeps)


def facts_of(cls: type) -> CallClass | None:
    """Return the facts about the outermost generated class among ``cls`` and its bases, or None."""
    return getattr(cls, _FACTS, None)


def stock_class(cls: type) -> type:
    """Return the class below all generated ones."""
    while (facts := facts_of(cls)) is not None:
        cls = facts.original
    return cls


def put_on(pipe: Any, call: Call, tell: Callable[[Any, str], None], keeps: str) -> None:
    """Give a pipeline a class of its own, of the same name, whose ``__call__`` is ``call``."""
    object.__setattr__(pipe, "__class__", CallClass(type(pipe), call, tell, keeps).cls)


def take_off(pipe: Any) -> None:
    """Give a pipeline its original class back, unless somebody else has changed the class since :func:`put_on`."""
    facts = facts_of(type(pipe))
    if facts is not None and type(pipe) is facts.cls and not facts.is_changed():
        object.__setattr__(pipe, "__class__", facts.original)


def _methods(facts: CallClass) -> dict[str, Any]:
    """Return the methods of a generated class that differ from those of its original."""
    original = facts.original

    @functools.wraps(original.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock_call = original.__call__  # as it is now: classes are patched
        if not facts.is_outermost(self):
            return stock_call(self, *args, **kwargs)
        return facts.call(self, stock_call, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return alone(self, lambda: _reduced(self, facts, protocol))

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        return alone(self, lambda: _deep_copy(self, facts, memo))

    @functools.wraps(original.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        facts.tell(self, "save_pretrained writes the plain pipeline")
        return original.save_pretrained(self, *args, **kwargs)

    def components(self: Any) -> Any:
        if sys._getframe(1).f_code.co_name == "from_pipe":  # a method of the other class, which no other sign reaches
            facts.tell(self, "from_pipe makes a plain pipeline of the same parts")
        return original.components.__get__(self)

    return {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__deepcopy__": __deepcopy__,
        "save_pretrained": save_pretrained,
        "components": property(components, doc=original.components.__doc__),
    }


def _reduced(pipe: Any, facts: CallClass, protocol: Any) -> Any:
    """Return how the original class reduces the pipeline, with generated classes named by the one below them."""
    reduced: Any = facts.original.__reduce_ex__(pipe, protocol)
    if isinstance(reduced, str):
        return reduced
    function, args, state, *rest = (*reduced, None)[: max(3, len(reduced))]
    is_made = [isinstance(value, type) and _FACTS in vars(value) for value in (function, *args)]
    function, *args = (stock_class(v) if made else v for v, made in zip((function, *args), is_made, strict=True))
    own = {}
    if isinstance(state, dict):  # that of this moment, its methods first: they know why a network has no pickle
        state = {**{name: state[name] for name in (facts.keeps,) if name in state}, **state}
    elif facts.keeps in vars(pipe):
        own = {facts.keeps: vars(pipe)[facts.keeps]}
    return _rebuilt, (facts, function, args, own), state, *rest


def _rebuilt(facts: CallClass, function: Callable[..., Any], args: list[Any], own: dict[str, Any]) -> Any:
    """Return the pipeline that ``function(*args)`` makes, with the class of ``facts``."""
    pipe = function(*args)
    if type(pipe) is facts.original:
        object.__setattr__(pipe, "__class__", facts.cls)
    vars(pipe).update(own)
    return pipe


def _deep_copy(pipe: Any, facts: CallClass, memo: dict[int, Any]) -> Any:
    """Copy a pipeline as :func:`copy.deepcopy` does, by the original's own ``__deepcopy__`` where it has one."""
    own = getattr(facts.original, "__deepcopy__", None)
    if own is not None:
        return own(pipe, memo)
    function, args, state, *_ = _reduced(pipe, facts, 4)
    duplicate = memo[id(pipe)] = function(*copy.deepcopy(args, memo))
    state = copy.deepcopy(state, memo)
    if hasattr(duplicate, "__setstate__"):
        duplicate.__setstate__(state)
    elif state is not None:
        vars(duplicate).update(state)
    return duplicate

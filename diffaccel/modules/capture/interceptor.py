"""What stands in a module's place for its calls, and asks its unit."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from diffaccel.modules.capture.arenas import Store
from diffaccel.modules.capture.unit import ModuleCall, PlainCall, Unit


class Interceptor:
    """A callable in the place of a module's ``forward``, or of its compiled call, that asks the unit.

    ``torch.compile`` looks through it: what is compiled around it runs as without it.

    Args:
        attribute: the module's attribute in whose place it stands.
        original: the instance's own value of it; None where its class has it.
    """

    def __init__(self, unit: Unit, attribute: str, original: PlainCall | None) -> None:
        self.unit, self.attribute, self.original = unit, attribute, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        return self.unit.answer(ModuleCall(self._plain, args, kwargs))

    def is_bypassed(self) -> bool:
        """Return whether the module was compiled after this was put on it: it then calls what was compiled."""
        return self.attribute == "forward" and vars(self.unit.module).get("_compiled_call_impl") is not None

    @classmethod
    def of(cls, module: nn.Module, store: Store) -> Interceptor:
        """Return what answers the calls of a module, below its own hooks where it is not compiled."""
        is_compiled = vars(module).get("_compiled_call_impl") is not None
        attribute = "_compiled_call_impl" if is_compiled else "forward"
        return cls(Unit(module, store, hooks_inside=is_compiled), attribute, vars(module).get(attribute))

    def put_on(self) -> None:
        """Take the place; :meth:`remove` undoes it."""
        vars(self.unit.module)[self.attribute] = self

    def remove(self) -> None:
        """Free the graphs and give the place back; may be called twice.

        What others have put around it since stays, and its calls are passed on.
        """
        self.unit.is_on = False
        self.unit.forget("removed")
        attributes = vars(self.unit.module)
        if attributes.get(self.attribute) is not self:
            return
        if self.original is None:
            del attributes[self.attribute]
        else:
            attributes[self.attribute] = self.original

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original or functools.partial(type(self.unit.module).forward, self.unit.module))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have; compiled functions stay behind, as with the module."""
        is_compiled = self.attribute != "forward" or hasattr(self.unit.module, "_orig_mod")
        return {**vars(self), "original": None if is_compiled else self.original}

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self.unit.module).forward(self.unit.module, *args, **kwargs)

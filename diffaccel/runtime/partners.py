"""Sessions of the other pipelines that a sampler composes with the one that is called."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.modules.stand_in import clone
from diffaccel.runtime.probe import open_session, stock_call
from diffaccel.session import Session

OWN = ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type", "return_dict", "latents")


@contextlib.contextmanager
def opened_partners(pipes: tuple[Any, ...], arguments: dict[str, Any]) -> Iterator[list[Session]]:
    """Open the same call of other pipelines; they are as they were afterwards.

    Args:
        arguments: the call's, by name. Those that a pipeline does not have are left out where they are at their default
            or say nothing.

    Raises:
        DiffAccelError: for a pipeline that a sampler cannot follow.
    """
    with contextlib.ExitStack() as stack:
        sessions = []
        for pipe in pipes:
            known = inspect.signature(stock_call(type(pipe))).parameters
            shared = {name: value for name, value in arguments.items() if name in known and name not in OWN}
            shared["generator"] = clone(arguments.get("generator"))
            try:
                sessions.append(stack.enter_context(open_session(pipe, **shared)))
            except TypeError as error:
                raise DiffAccelError(f"{type(pipe).__name__} does not take the call's arguments: {error}.") from error
        yield sessions

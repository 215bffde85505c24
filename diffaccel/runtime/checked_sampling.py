"""A sampler's generator, with what it yields and returns checked: a mistake in a plugin is named with the sampler."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, get_args

from torch import Tensor

from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.session import Eval, Event, Sampling, Session

EVENTS = tuple(kind for kind in get_args(Event) if isinstance(kind, type))
NAMES = ", ".join(kind.__name__ for kind in EVENTS)


def checked_sampling(config: SamplerConfig, session: Session) -> Sampling:
    """Return the config's generator for a session, checked as it runs.

    Raises:
        DiffAccelError: for anything but a generator; from the generator, for an event that is none, and for a result
            that is no tensor.
    """
    sampling = config.sample(session)
    if not isinstance(sampling, Generator):
        raise DiffAccelError(
            f"The sampler '{config.name}' gave {_kind(sampling)} where a generator is needed. Let its sample() yield "
            "Eval and Step, as diffaccel/samplers/euler.py does."
        )
    return _checked(config.name, sampling)


def _checked(name: str, sampling: Sampling) -> Sampling:
    reply: Any = None
    try:
        while True:
            try:
                event = sampling.send(reply)
            except StopIteration as stop:
                if not isinstance(stop.value, Tensor):
                    raise DiffAccelError(
                        f"The sampler '{name}' returned {_kind(stop.value)}; it must return its last latents, a tensor."
                    ) from None
                return stop.value
            items = event if isinstance(event, list) and event else [event]
            wrong = [item for item in items if not isinstance(item, Eval if isinstance(event, list) else EVENTS)]
            if wrong:
                raise DiffAccelError(
                    f"The sampler '{name}' yielded {_kind(wrong[0])}{' in a list' * isinstance(event, list)}; it may "
                    f"yield {NAMES}, or a list of Eval."
                )
            reply = yield event
    finally:
        sampling.close()


def _kind(value: Any) -> str:
    return "None" if value is None else f"an object of the class {type(value).__name__}"

"""Warnings about a pipeline that its user needs to read once, and not at every call."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

_SAID: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # by pipeline, which may go


def warn_once(logger: logging.Logger, pipe: Any, text: str, *values: object) -> None:
    """Log ``text % values`` as a warning, unless that was said of this pipeline before."""
    message = text % values
    said = _SAID.setdefault(pipe, set())
    if message not in said:
        said.add(message)
        logger.warning(message)

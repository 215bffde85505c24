"""The one exception that users see; its message says what is wrong, what was given, what is allowed and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST, _HEAD, _TAIL, _NAME = 2000, 700, 400, 100  # characters of a message, of its kept ends, of a name


class DiffAccelError(ValueError):
    """Bad input or an impossible request; the message names the fix.

    A message that echoes a very long value is cut in its middle: it begins with what is wrong, and ends with the fix.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message), _LONGEST, _HEAD, _TAIL))


class UnsupportedBySampler(DiffAccelError):
    """A sampler's request that this pipeline or driver cannot answer."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> DiffAccelError:
    """Return the error for a name that is not in ``allowed``, with the nearest match first."""
    names = sorted(allowed)
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{matches[0]}'? " if matches else ""
    name = shortened(name, _NAME)
    return DiffAccelError(f"Unknown {kind} '{name}'. {hint}Known: {', '.join(names) or 'none'}.")


def shortened(text: str, longest: int, head: int = 60, tail: int = 20) -> str:
    """Return a text as it is, or only its ends when it has more than ``longest`` characters."""
    if len(text) <= longest:
        return text
    return f"{text[:head]} ... ({len(text) - head - tail} more characters) ... {text[-tail:]}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return an error's message on one line, cut to ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def size_text(height: int, width: int) -> str:
    """Return a picture's size as people read it everywhere: ``WIDTHxHEIGHT``; Python takes ``(height, width)``."""
    return f"{width}x{height}"

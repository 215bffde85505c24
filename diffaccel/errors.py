"""The one exception that users see; its message says what is wrong, what was given, what is allowed and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffAccelError(ValueError):
    """Bad input or an impossible request; the message names the fix."""


class UnsupportedBySampler(DiffAccelError):
    """A sampler's request that this pipeline or driver cannot answer."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> DiffAccelError:
    """Return the error for a name that is not in ``allowed``, with the nearest match first."""
    names = sorted(allowed)
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{matches[0]}'? " if matches else ""
    return DiffAccelError(f"Unknown {kind} '{name}'. {hint}Known: {', '.join(names) or 'none'}.")


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return an error's message on one line, cut to ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def size_text(height: int, width: int) -> str:
    """Return a picture's size as people read it everywhere: ``WIDTHxHEIGHT``; Python takes ``(height, width)``."""
    return f"{width}x{height}"

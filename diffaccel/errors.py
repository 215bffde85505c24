"""The one exception users see: what was wrong, what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffAccelError(ValueError):
    """Bad input or an impossible request, said in one sentence that names the fix."""


class UnsupportedBySampler(DiffAccelError):
    """A sampler asked its driver for something that this pipeline or driver cannot give."""


def unknown(what: str, got: str, allowed: Iterable[str]) -> DiffAccelError:
    """An error for a name that is not in ``allowed``, with the nearest match first."""
    names = sorted(allowed)
    near = difflib.get_close_matches(got.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return DiffAccelError(f"Unknown {what} '{got}'. {hint}Known: {', '.join(names) or 'none'}.")


def first_line(error: BaseException, limit: int = 200) -> str:
    """An error's message on one line of readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""Requests of a comparison: which prompts or classes are drawn, and a request that repeats a run's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval.sets import prompts as prompt_sets
from diffaccel.runs.call_arguments import check_subjects, source_of
from diffaccel.runs.request import Request

DEFAULT_SET, DEFAULT_FIRST = "emoji-1000", 100


def load_texts(prompts: str | Sequence[str] | None, first: int | None = None) -> tuple[str, ...]:
    """Return the texts of a packaged set, a file, or a sequence; none for None.

    Raises:
        DiffAccelError: for ``first`` below 1, a file that cannot be read, and a sequence of nothing.
    """
    if first is not None and first < 1:
        raise DiffAccelError(f"first is {first}; it must be at least 1.")
    if prompts is None:
        return ()
    if isinstance(prompts, str):
        return prompt_sets.read(prompts).first(first).texts
    if not (texts := tuple(prompts)):
        raise DiffAccelError("Got no prompts, an empty sequence. Give one or more, or None for the default ones.")
    return texts[:first]


def with_texts(request: Request, texts: Sequence[str], pipeline: Any, first: int | None = None) -> Request:
    """Return ``request`` with the texts as what the pipeline takes: prompts, classes, or nothing.

    Args:
        request: everything else; its ``num`` counts the pictures of a pipeline that draws from noise alone.
        texts: none takes the first ones of ``emoji-1000`` for a pipeline that draws from text.
        pipeline: an open one, a class, or None where it is not known: then texts are prompts.
        first: how many of ``emoji-1000``, where no texts are given; None for 100.

    Raises:
        DiffAccelError: for texts, or a number of them, and a pipeline that takes none; no class for one that needs it.
    """
    source = "text" if pipeline is None else source_of(pipeline)
    if source == "text":
        texts = texts or load_texts(DEFAULT_SET, first or DEFAULT_FIRST)
    elif source == "nothing" and first is not None and not texts:
        raise DiffAccelError(
            f"first is {first}, a number of prompts, and '{request.model}' draws from noise alone. Give num, the "
            "number of its pictures."
        )
    if source == "class":
        request = replace(request, classes=tuple(texts), prompts=())
    else:
        request = replace(request, prompts=tuple(texts), classes=())
    if pipeline is not None:
        check_subjects(pipeline, request)
    return request


def pipeline_name(pipe: Any) -> str:
    """Return an open pipeline's name: the zoo's where it came from there, else its folder's, else its class's."""
    path = Path(str(pipe.config.get("_name_or_path") or ""))
    zoo_name = path.name.rpartition("-")[0]  # the zoo's folders carry a digest
    return zoo_name if zoo_name in zoo.names() else path.name or type(pipe).__name__


def from_settings(settings: dict[str, Any], **changes: Any) -> Request:
    """Rebuild the request of a run from the settings in its record, without its methods.

    Args:
        settings: of the run's record.
        changes: fields of the request that take other values.
    """
    size = settings.get("size")
    fields: dict[str, Any] = {name: settings[name] for name in ("num", "seed", "batch") if name in settings}
    fields |= {name: settings[name] for name in ("model", "guidance", "negative", "dtype", "steps") if name in settings}
    fields |= {name: tuple(settings.get(name) or ()) for name in ("prompts", "classes")}
    fields |= {"size": tuple(size) if size else None, "threads": settings.get("threads", 0)}
    fields |= {"device": settings.get("device", "auto"), "latents": settings.get("latents", False)}
    fields["prompts"] = tuple(prompt for prompt in fields["prompts"] if prompt is not None)
    return Request(**(fields | changes))

"""What a model draws from: texts, classes, or noise alone; and the pictures of a comparison as a request."""

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
Prompts = str | Sequence[str] | None


def texts_of(prompts: Prompts, first: int | None = None) -> tuple[str, ...]:
    """The texts of a packaged set, a file, or a sequence; none for None."""
    if first is not None and first < 1:
        raise DiffAccelError(f"first is {first}; it must be at least 1.")
    if prompts is None:
        return ()
    if isinstance(prompts, str):
        return prompt_sets.read(prompts).first(first).texts
    return tuple(prompts)[:first]


def drawing(pipeline: Any, request: Request, texts: Sequence[str]) -> Request:
    """``request`` with the texts as what the pipeline takes: prompts, classes, or nothing.

    Args:
        pipeline: an open one, a class, or None where it is not known: then texts are prompts.
        request: everything else; its ``num`` counts the pictures of a pipeline that draws from noise alone.
        texts: none takes the first 100 of ``emoji-1000`` for a pipeline that draws from text.

    Raises:
        DiffAccelError: for texts and a pipeline that takes none, or no class for one that needs it.
    """
    source = "text" if pipeline is None else source_of(pipeline)
    if source == "text":
        texts = texts or texts_of(DEFAULT_SET, DEFAULT_FIRST)
        made = replace(request, prompts=tuple(texts), classes=())
    elif source == "class":
        made = replace(request, classes=tuple(texts), prompts=())
    else:
        made = replace(request, prompts=tuple(texts), classes=())
    if pipeline is not None:
        check_subjects(pipeline, made)
    return made


def name_of(pipe: Any) -> str:
    """What an open pipeline is called: the zoo's name where it came from there, else its folder's, else its class's."""
    path = Path(str(pipe.config.get("_name_or_path") or ""))
    known = path.name.rpartition("-")[0]  # the zoo's folders carry a digest
    return known if known in zoo.names() else path.name or type(pipe).__name__


def again(settings: dict[str, Any], **changes: Any) -> Request:
    """The request that a run's settings describe, without its methods, steps aside: another side of the same pictures.

    Raises:
        DiffAccelError: for settings of a function's pictures, which no model drew.
    """
    size = settings.get("size")
    known: dict[str, Any] = {name: settings[name] for name in ("num", "seed", "batch") if name in settings}
    known |= {name: settings[name] for name in ("model", "guidance", "negative", "dtype", "steps") if name in settings}
    known |= {name: tuple(settings.get(name) or ()) for name in ("prompts", "classes")}
    known |= {"size": tuple(size) if size else None, "threads": settings.get("threads", 0)}
    known |= {"device": settings.get("device", "auto"), "latents": settings.get("latents", False)}
    known["prompts"] = tuple(prompt for prompt in known["prompts"] if prompt is not None)
    return Request(**(known | changes))

"""Check what a model's JSON files decide about a request, before weights are read or diffusers is imported."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffaccel import zoo
from diffaccel.families import FAMILIES, find
from diffaccel.runs.call_arguments import no_prompt
from diffaccel.runs.loading import INDEX, check_pipeline, find_folder
from diffaccel.runs.request import Request


class _Config(SimpleNamespace):
    """A network's config: attributes, and ``get`` as of a dict."""

    def get(self, name: str, default: Any = None) -> Any:
        return vars(self).get(name, default)


def check_early(request: Request) -> None:
    """Raise for a missing prompt, or a size that does not fit a model on this machine.

    What cannot be told from the files is left to the checks of the open pipeline.

    Raises:
        DiffAccelError: as those checks do, and when there is no such model.
    """
    folder = find_folder(request.model)
    if folder is None:  # on the hub
        return
    check_pipeline(request.model, folder)
    index = _read(folder / INDEX)
    pipeline = index.get("_class_name")
    if pipeline not in FAMILIES:
        return
    if request.subjects == (None,) and any(name.startswith("tokenizer") for name in index):
        raise no_prompt()
    if request.size is not None:
        outline = _outline(pipeline, folder)
        with contextlib.suppress(AttributeError, LookupError, TypeError):  # more than the files tell is needed
            family = find(outline)
            if family is not None:
                family.check_size(outline, *request.size)


def note_of_unknown_words(request: Request, longest: int = 5) -> str:
    """Return a sentence about words that a zoo model never saw in training, each with the nearest label; or ""."""
    vocabulary = zoo.vocabulary_of(request.model)
    if vocabulary is None or not request.prompts:
        return ""
    unknown = vocabulary.unknown(request.prompts)
    words = [f"'{word}'" + (f" (nearest: {label})" if label else "") for word, label in unknown.items()][:longest]
    if len(unknown) > longest:
        words.append(f"{len(unknown) - longest} more")
    if not words:
        return ""
    return (
        f"{request.model} never saw {', '.join(words)}, so expect something else there; diffaccel explain "
        f"{request.model} lists the {len(vocabulary.all_labels)} things that it draws."
    )


def _outline(pipeline: str, folder: Path) -> Any:
    """Return an object of the pipeline's class name that has the configs of its networks and its scale factors."""
    configs = {name: _Config(**_read(folder / name / "config.json")) for name in ("vae", "transformer", "unet")}
    outline = type(pipeline, (), {})()
    for name, config in configs.items():
        if vars(config):
            setattr(outline, name, SimpleNamespace(config=config))
    vae = configs["vae"]
    if hasattr(vae, "block_out_channels"):
        outline.vae_scale_factor = outline.vae_scale_factor_spatial = 2 ** (len(vae.block_out_channels) - 1)
    for name in ("scale_factor_spatial", "spatial_compression_ratio"):
        if hasattr(vae, name):
            outline.vae_scale_factor_spatial = getattr(vae, name)
    return outline


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}

"""Embedded models: small, trained, and available offline.

>>> import diffaccel.zoo
>>> from diffusers import FluxPipeline
>>> pipe = FluxPipeline.from_pretrained(diffaccel.zoo.path("emoji-flux"))

``emoji-flux`` is a complete text-to-image ``FluxPipeline``, ``emoji-flux-1step`` its student of one network call, and
``coinrun-nfd`` a world model. ``emoji-clip-reward`` and ``emoji-clip-judge`` are two
CLIPs in open_clip layout: ``open_clip.create_model_and_transforms(f"local-dir:{path(...)}")``. The first may be a
reward in search and tuning; the second only judges, and is used in neither.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel.errors import DiffAccelError, unknown

if TYPE_CHECKING:
    from diffaccel.zoo.vocabulary import Vocabulary

__all__ = ["DEFAULT", "call_defaults", "card", "name_of", "names", "path", "vocabulary_of"]

DEFAULT = "emoji-flux"
_ROOT = Path(str(files(__name__)))
CARD = "card.json"


def names() -> list[str]:
    """Return the names of the models that ship with this installation."""
    return sorted(p.parent.name for p in _ROOT.glob("*/manifest.json"))


def card(name: str) -> dict[str, Any]:
    """Return a model's card: licence, attribution, recipe, data, measured quality, state, sizes, defaults."""
    file = _packed(name) / CARD
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"The card '{file}' cannot be read ({error}); reinstall diffaccel.") from error


def path(name: str = DEFAULT, *, verify: bool = False) -> Path:
    """Return the folder of a model, as stock ``from_pretrained`` (or open_clip's ``local-dir:``) loads it.

    The packed weights are written once to the user's cache folder (``DIFFACCEL_CACHE`` names another one) as plain
    bf16 files. No network is used. Files that may have changed since they were read last are compared with their
    sha256, with ``verify=True`` all of them, and a damaged folder is unpacked again.
    """
    from diffaccel.zoo.store import materialise

    return materialise(_packed(name), name, verify=verify)


def _packed(name: str) -> Path:
    if name not in names():
        raise unknown("zoo model", name, names())
    return _ROOT / name


def name_of(model: str) -> str:
    """Return the zoo's name of a model that is given by its name or by its folder; "" for any other model."""
    if model in names():
        return model
    if not model or not Path(model).is_dir():
        return ""
    folder = Path(model).resolve()
    likely = [name for name in names() if folder.name.startswith(f"{name}-")]  # folders carry a digest
    return next((name for name in likely if path(name).resolve() == folder), "")


def call_defaults(name: str) -> dict[str, Any]:
    """Return the call arguments that a zoo model's card recommends; none for other models."""
    return card(name).get("defaults", {}) if name in names() else {}


def vocabulary_of(name: str) -> Vocabulary | None:
    """Return what a zoo model draws, and the words of its captions; None for models without such a list."""
    from diffaccel.zoo.vocabulary import read

    return read(_packed(name)) if name in names() else None


def __dir__() -> list[str]:
    return sorted(__all__)

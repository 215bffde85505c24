"""diffaccel: diffusion and flow pipelines, faster, smaller and better, in one line and with proof.

``accelerate(pipe, ...)`` applies methods to a diffusers pipeline, ``remove(pipe)`` takes them off again to the bit,
``summary(pipe)`` lists the active methods, ``set_quality(pipe, name)`` picks another point of a preset, ``load(name)``
opens a model of the zoo, a folder or a hub id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffaccel.former import install
from diffaccel.lazy import lazily

if TYPE_CHECKING:
    from diffaccel.compose import accelerate, remove, set_quality, summary
    from diffaccel.errors import DiffAccelError
    from diffaccel.runs.loading import load
    from diffaccel.runtime.probe import open_session

__version__ = "0.1.0"
__all__ = ["DiffAccelError", "__version__", "accelerate", "load", "open_session", "remove", "set_quality", "summary"]

_LAZY = {
    "accelerate": "diffaccel.compose",
    "remove": "diffaccel.compose",
    "summary": "diffaccel.compose",
    "set_quality": "diffaccel.compose",
    "load": "diffaccel.runs.loading",
    "open_session": "diffaccel.runtime.probe",
    "DiffAccelError": "diffaccel.errors",
}


install()  # module names of version 0.1


__getattr__ = lazily(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted([*__all__, *({"eval", "quant", "samplers", "zoo"} & globals().keys())])

"""Module names of version 0.1 that the documentation gave, kept for code that was written against them.

They are found last, after every module that exists: ``from diffaccel.requests import Request`` gives the class of
``diffaccel.runs.request`` and a :class:`DeprecationWarning` that names the new place.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER = {
    "diffaccel.requests": "diffaccel.runs.request",
    "diffaccel.sampling": "diffaccel.runs.generate",
    "diffaccel.eval.alignment": "diffaccel.eval.metrics.clip_score",
    "diffaccel.eval.feature_statistics": "diffaccel.eval.features.statistics_files",
    "diffaccel.eval.frechet": "diffaccel.eval.metrics.frechet",
    "diffaccel.eval.frechet_intervals": "diffaccel.eval.metrics.frechet_intervals",
    "diffaccel.eval.inception_score": "diffaccel.eval.metrics.inception_score",
    "diffaccel.eval.intervals": "diffaccel.eval.uncertainty.intervals",
    "diffaccel.eval.lpips": "diffaccel.eval.networks.lpips",
    "diffaccel.eval.manifold": "diffaccel.eval.metrics.manifold",
    "diffaccel.eval.mind": "diffaccel.eval.metrics.mind",
    "diffaccel.eval.mmd": "diffaccel.eval.metrics.mmd",
    "diffaccel.eval.paired": "diffaccel.eval.metrics.paired",
    "diffaccel.eval.scorers": "diffaccel.eval.networks.scorers",
    "diffaccel.eval.sequential": "diffaccel.eval.uncertainty.sequential",
    "diffaccel.eval.tiny_network": "diffaccel.eval.networks.tiny_network",
    "diffaccel.eval.video": "diffaccel.eval.metrics.video",
}


class FormerNames(MetaPathFinder, Loader):
    """Find a module under its former name; its contents are those of the module that took its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a name of :data:`FORMER`, None for any other."""
        return ModuleSpec(fullname, self) if fullname in FORMER else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to Python to make an empty module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the names of its successor."""
        successor = FORMER[module.__name__]
        warnings.warn(f"{module.__name__} is now {successor}", DeprecationWarning, stacklevel=2)
        module.__dict__.update({k: v for k, v in vars(import_module(successor)).items() if not k.startswith("__")})


def install() -> None:
    """Let former names be found, once for a process."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())

"""Registry of methods by name: a dict of lazy references, and the entry-point group ``diffaccel.plugins``.

A plugin package adds methods by entry points of that group, ``name = "package.module:ConfigClass"``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from diffaccel.config import ORDER
from diffaccel.errors import DiffAccelError, first_line, unknown

METHODS = {
    "euler": "diffaccel.samplers.euler:Euler",
    "heun": "diffaccel.samplers.heun:Heun",
    "dpmpp2m": "diffaccel.samplers.dpmpp2m:DPMpp2M",
    "ancestral": "diffaccel.samplers.ancestral:Ancestral",
    "rbf": "diffaccel.samplers.rbf:RBF",
    "bon": "diffaccel.samplers.bon:BoN",
    "smc": "diffaccel.samplers.smc:SMC",
    "svdd": "diffaccel.samplers.svdd:SVDD",
    "code": "diffaccel.samplers.code:CoDe",
    "sop": "diffaccel.samplers.sop:SoP",
    "drafts": "diffaccel.samplers.drafts.config:Drafts",
    "bottleneck": "diffaccel.samplers.bottleneck.config:Bottleneck",
    "superdiff": "diffaccel.samplers.superdiff.config:SuperDiff",
    "scheduler": "diffaccel.samplers.scheduler:Scheduler",
    "nfd": "diffaccel.samplers.nfd.config:NFD",
    "spectrum": "diffaccel.samplers.caches.spectrum:Spectrum",
    "seacache": "diffaccel.samplers.caches.seacache:SeaCache",
    "firstblock": "diffaccel.samplers.caches.firstblock:FirstBlockCache",
    "taylorseer": "diffaccel.samplers.caches.taylorseer:TaylorSeer",
    "diffusers_cache": "diffaccel.samplers.caches.diffusers_cache:DiffusersCache",
    "rolling_context": "diffaccel.samplers.caches.rolling_context:RollingContext",
    "cache_dit": "diffaccel.samplers.caches.cache_dit:CacheDiT",
    "w8a8": "diffaccel.quant.w8a8:W8A8",
    "w4a16": "diffaccel.quant.w4a16:W4A16",
    "w4a8": "diffaccel.quant.w4a8:W4A8",
    "qvgen": "diffaccel.quant.qvgen.config:QVGen",
    "mixdq": "diffaccel.quant.mixdq.config:MixDQ",
    "tib": "diffaccel.quant.tib.config:TIB",
    "fused_blocks": "diffaccel.modules.fused.config:FusedBlocks",
    "capture": "diffaccel.modules.capture.config:Capture",
}
TRAINERS = {  # methods that make a model, and are put on none
    "sim": "diffaccel.distill.sim:SIM",
    "tscd": "diffaccel.distill.tscd:TSCD",
}
PLUGINS = "diffaccel.plugins"


def trainer(name: str) -> tuple[type[Any], Any]:
    """Return the config class and the training function of a method that makes a model."""
    if name not in TRAINERS:
        raise unknown("method of training", name, TRAINERS)
    config_class = _resolve(TRAINERS[name])
    return config_class, _resolve(config_class.trainer)


def training_function(config_class: type[Any]) -> Any:
    """Return the function that trains a network by a method that can be put on a pipeline as well."""
    return _resolve(config_class.trainer)


def worker(config: Any) -> Any:
    """Return the function that makes what a quantizer needs of a model before it can be applied; None for none."""
    return _resolve(config.worker) if getattr(config, "worker", "") else None


def _resolve(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


@functools.lru_cache(maxsize=8)
def _plugins(read: Callable[..., Any], path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of plugins; reading those of all installed packages takes 12 ms, so once for a path."""
    return tuple(read(group=PLUGINS))


def names() -> dict[str, str]:
    """Return every known method and the reference of its config class; nothing is imported."""
    references = dict(METHODS)
    for point in _plugins(entry_points, tuple(sys.path)):
        if point.name in METHODS:
            raise DiffAccelError(
                f"The plugin {point.value} names its method '{point.name}', which diffaccel has already. Rename it."
            )
        if references.get(point.name, point.value) != point.value:
            raise DiffAccelError(
                f"Two plugins name their method '{point.name}': {references[point.name]} and {point.value}. "
                "Uninstall one."
            )
        references[point.name] = point.value
    return references


def config_class(name: str) -> type[Any]:
    """Return the config class of a method.

    Raises:
        DiffAccelError: for an unknown name, with the nearest match; for a plugin that cannot be imported, or whose
            class is no config of that name.
    """
    references = names()
    if name not in references:
        raise unknown("method", name, references)
    module, _, attribute = references[name].partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a plugin's own code runs
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        raise DiffAccelError(
            f"The method '{name}' ({references[name]}) cannot be imported: {kind}{first_line(error)}."
        ) from error
    if getattr(cls, "name", None) != name or getattr(cls, "touches", None) not in ORDER:
        raise DiffAccelError(
            f"The method '{name}' ({references[name]}) is no config class of that name. It needs name = '{name}', and "
            f"touches one of {', '.join(ORDER)}, as subclasses of diffaccel.config.Config have."
        )
    return cls

"""Facts about denoising networks, as data: blocks, layers to keep in high precision, tokens, time convention.

Quantizers, caches, samplers and the evaluation read them here and nowhere else. Names are dotted module names inside
the network, without the prefix ``_orig_mod.`` of ``torch.compile``. Every entry is tested against a network of its
class and against the arguments that the stock pipeline passes to it.
"""

from __future__ import annotations

from typing import Any

from diffaccel.errors import unknown
from diffaccel.families.facts_data import FACTS, Facts
from diffaccel.modules.stand_in import uncompiled

__all__ = ["Facts", "facts_of"]


def facts_of(network: Any) -> Facts:
    """Return the facts about a network, by its class or the nearest listed base.

    Raises:
        DiffAccelError: no base of the class is listed; names the nearest and all known classes.
    """
    cls = type(uncompiled(network))
    for base in cls.__mro__:
        if base.__name__ in FACTS:
            return FACTS[base.__name__]
    raise unknown("denoiser class", cls.__name__, FACTS)

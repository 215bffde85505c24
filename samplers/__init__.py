"""Samplers: one method, one file, a config dataclass and a generator function."""

if "." not in __name__:
    raise ImportError("'samplers' is a folder of diffaccel: import diffaccel.samplers instead")

from typing import TYPE_CHECKING

from diffaccel.lazy import lazily
from diffaccel.samplers.ancestral import Ancestral
from diffaccel.samplers.bon import BoN
from diffaccel.samplers.bottleneck.config import Bottleneck
from diffaccel.samplers.caches.cache_dit import CacheDiT
from diffaccel.samplers.caches.diffusers_cache import DiffusersCache
from diffaccel.samplers.caches.firstblock import FirstBlockCache
from diffaccel.samplers.caches.rolling_context import RollingContext
from diffaccel.samplers.caches.seacache import SeaCache
from diffaccel.samplers.caches.spectrum import Spectrum
from diffaccel.samplers.caches.taylorseer import TaylorSeer
from diffaccel.samplers.code import CoDe
from diffaccel.samplers.dpmpp2m import DPMpp2M
from diffaccel.samplers.drafts.config import Drafts
from diffaccel.samplers.euler import Euler
from diffaccel.samplers.heun import Heun
from diffaccel.samplers.nfd.config import NFD
from diffaccel.samplers.rbf import RBF
from diffaccel.samplers.scheduler import Scheduler
from diffaccel.samplers.smc import SMC
from diffaccel.samplers.sop import SoP
from diffaccel.samplers.superdiff.config import SuperDiff
from diffaccel.samplers.svdd import SVDD

if TYPE_CHECKING:
    from diffaccel.samplers.chunks import ChunkSampler
    from diffaccel.samplers.nfd.sampler import NextFrameSampler

__all__ = [
    "NFD", "RBF", "SMC", "SVDD", "Ancestral", "BoN", "Bottleneck", "CacheDiT", "ChunkSampler", "CoDe", "DPMpp2M",
    "DiffusersCache", "Drafts", "Euler", "FirstBlockCache", "Heun", "NextFrameSampler", "RollingContext", "Scheduler",
    "SeaCache", "SoP", "Spectrum", "SuperDiff", "TaylorSeer",
]  # fmt: skip

_LAZY = {  # with these come the networks of diffusers, which take seconds to import
    "ChunkSampler": "diffaccel.samplers.chunks", "NextFrameSampler": "diffaccel.samplers.nfd.sampler",
}  # fmt: skip


__getattr__ = lazily(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted(__all__)

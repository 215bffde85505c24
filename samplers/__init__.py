"""Samplers: one method, one file, a config dataclass and a generator function."""

if "." not in __name__:
    raise ImportError("'samplers' is a folder of diffaccel: import diffaccel.samplers instead")

from diffaccel.samplers.ancestral import Ancestral
from diffaccel.samplers.dpmpp2m import DPMpp2M
from diffaccel.samplers.euler import Euler
from diffaccel.samplers.heun import Heun
from diffaccel.samplers.scheduler import Scheduler

__all__ = ["Ancestral", "DPMpp2M", "Euler", "Heun", "Scheduler"]

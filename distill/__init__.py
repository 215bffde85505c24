"""Distillation: a network that draws in one call, or in a few, learns from one that needs many."""

if "." not in __name__:
    raise ImportError("'distill' is a folder of diffaccel: import diffaccel.distill instead")

from diffaccel.distill.run import Distillation
from diffaccel.distill.scheduler import SIMFewStepScheduler, SIMOneStepScheduler, TrajectoryScheduler
from diffaccel.distill.sim import SIM
from diffaccel.distill.student import save, student
from diffaccel.distill.teacher import NetworkTeacher, PipelineTeacher
from diffaccel.distill.train import distil
from diffaccel.distill.trajectory import TrajectoryRun
from diffaccel.distill.tscd import TSCD

__all__ = [
    "SIM",
    "TSCD",
    "Distillation",
    "NetworkTeacher",
    "PipelineTeacher",
    "SIMFewStepScheduler",
    "SIMOneStepScheduler",
    "TrajectoryRun",
    "TrajectoryScheduler",
    "distil",
    "save",
    "student",
]


def __dir__() -> list[str]:
    return sorted(__all__)

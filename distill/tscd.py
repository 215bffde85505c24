"""Trajectory-segmented consistency distillation: a student that jumps along the teacher's trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.distill.segments import Segments


@dataclass(frozen=True, kw_only=True)
class TSCD(Segments):
    """Distillation by consistency inside of segments of the teacher's trajectories, from prompts alone.

    A trajectory from noise to a picture is cut into segments, at first 8, then 4, 2 and 1. The student learns to jump
    from any point to the end of the point's segment: it is to arrive where its average arrives from the next point of
    the trajectory. It draws in one network call a segment of the last number, and ``sim`` can begin with it.
    """

    name: ClassVar[str] = "tscd"
    trainer: ClassVar[str] = "diffaccel.distill.train:distil"
    citation: ClassVar[str] = (
        "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis, arXiv 2404.13686"
    )

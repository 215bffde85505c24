"""The tuner: the fastest mix of methods that keeps a promise, chosen on some prompts and certified on others."""

from __future__ import annotations

from diffaccel.eval.tuning.result import Tuned
from diffaccel.eval.tuning.tune import tune

__all__ = ["Tuned", "tune"]

"""QVGen: weights and activations of 4 or 3 bits by training, with a side branch that vanishes on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diffaccel.errors import unknown
from diffaccel.quant.qvgen.options import TrainedQuantization


@dataclass(frozen=True, kw_only=True)
class QVGen(TrainedQuantization):
    """Quantization-aware training of linears: ``y = (W_q + L diag(g) R) x_q + b``, after which L and R are gone.

    ``W_q = s (clamp(round(W / s + z)) - z)`` has a trained scale and zero for each row, ``x_q`` its own range for each
    token with trained clipping. L and R begin as the best matrix of their rank for ``W - W_q``, so that training begins
    near the full-precision network, whose predictions it follows; then their rank falls to nothing. Trained by
    ``diffaccel quantize --method qvgen --data ...``. Put on a pipeline without training, scales come from a search
    alone.
    """

    name: ClassVar[str] = "qvgen"
    trainer: ClassVar[str] = "diffaccel.quant.qvgen.train:quantize_aware"
    citation: ClassVar[str] = "QVGen: Pushing the Limit of Quantized Video Generative Models, arXiv 2505.11497"

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the published settings of Wan 1.3B: all linears, rank 32 in phases of 444 steps, 2667 in all."""
        return cls.preset("paper", **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return settings by name: "qvgen", "paper", "lsq" (no side branch), "dsa", and "dsa+rank" (both)."""
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "qvgen": {},
    "paper": {"layers": "all", "convs": "keep", "steps": 2667, "phase_steps": 444, "batch": 48},
    "lsq": {"rank": 0},
    "dsa": {"recipe": "dsa", "symmetric": True, "rank": 0},
    "dsa+rank": {"recipe": "dsa", "symmetric": True},
}

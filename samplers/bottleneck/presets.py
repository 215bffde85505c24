"""Presets of :class:`Bottleneck`, named after their sources: the options that each has, with its defaults."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffaccel.errors import DiffAccelError

FEW_STEPS = 9  # up to here a call counts as one of a distilled few-step model

# options that a preset has; all others are refused
PRESETS: dict[str, dict[str, Any]] = {
    "bottleneck": {
        "scales": (1.0, 0.5, 1.0),
        "stage_steps": None,
        "starts": (1.0, 0.8, 0.6),
        "shifts": None,
        "stage_end": "clean",
        "strength_space": "sigma",
        "count": "nominal",
        "noise": "shared",
        "resize": "bilinear",
    },
    "speed": {"scales": (0.5, 1.0), "tolerance": 0.01, "spectrum": None, "switches": None, "noise": "shared"},
    "selflift-zero": {
        "scales": (0.5, 1.0), "switches": (0.75,), "lift": (0.35, 0.5, 1.0), "noise": "shared", "resize": "bicubic",
    },
    "lightx2v": {"scales": (0.75, 1.0), "switches": (0.5,), "noise": "shared", "resize": "bilinear"},
}  # fmt: skip


class HighLowHigh(NamedTuple):
    """Stages of the preset "bottleneck": scales, the ratio of their steps, their first levels, their shifts."""

    scales: tuple[float, ...]
    steps: tuple[int, ...]
    starts: tuple[float, ...]
    shifts: tuple[float, ...] | None = None


# by family: FLUX and HunyuanVideo are the paper's own (arXiv 2503.18940), the others lie near the shift that the model
# is usually sampled with
STAGES = {
    "flux": HighLowHigh((1.0, 0.5, 1.0), (6, 20, 8), (1.0, 0.8, 0.6), (9.0, 6.0, 9.0)),
    "sd3": HighLowHigh((1.0, 0.5, 1.0), (6, 18, 7), (1.0, 0.8, 0.6), (5.0, 3.0, 5.0)),
    "hunyuan_video": HighLowHigh((1.0, 0.75, 1.0), (4, 24, 16), (1.0, 0.8, 0.7), (7.0, 9.0, 9.0)),
    "wan": HighLowHigh((1.0, 0.75, 1.0), (4, 24, 16), (1.0, 0.8, 0.7), (8.0, 5.0, 8.0)),
    "sdxl": HighLowHigh((1.0, 0.75, 1.0), (6, 20, 8), (1.0, 0.8, 0.6)),
}
OTHERS = HighLowHigh((1.0, 0.5, 1.0), (6, 20, 8), (1.0, 0.8, 0.6))


def too_few(total: int, stages: int) -> DiffAccelError:
    """Return the error for a call of fewer steps than stages."""
    steps = "1 step does" if total == 1 else f"{total} steps do"
    return DiffAccelError(
        f"{steps} not fill {stages} stages. Pass num_inference_steps={stages} or more; with an image to begin at, only "
        "the share `strength` of them is made."
    )


def shares(total: int, ratio: tuple[int, ...]) -> tuple[int, ...]:
    """Divide ``total`` steps in a ratio, each stage at least one; what rounding leaves goes to the largest remainders.

    Raises:
        DiffAccelError: for fewer steps than stages.
    """
    if total < len(ratio):
        raise too_few(total, len(ratio))
    exact = [total * part / sum(ratio) for part in ratio]
    counts = [max(1, int(value)) for value in exact]
    order = sorted(range(len(ratio)), key=lambda stage: counts[stage] - exact[stage])
    for turn in range(abs(total - sum(counts))):
        if sum(counts) < total:
            counts[order[turn % len(order)]] += 1
        else:
            counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
    return tuple(counts)

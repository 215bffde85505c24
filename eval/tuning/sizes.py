"""How a budget of seconds is spent: half on the search, the rest on the choice, the certificate and the neighbours."""

from __future__ import annotations

import random
from collections.abc import Sequence

from diffaccel.errors import DiffAccelError
from diffaccel.eval.tuning.halving import Sizes

GPU_SECONDS, CPU_SECONDS = 900.0, 1800.0
LEAST_HELD_OUT, MOST_HELD_OUT = 12, 96
LEAST_TUNING, MOST_TUNING = 6, 48
_SEARCH = 0.5  # share of the budget


def default_budget(device_type: str) -> float:
    """Return the seconds of a tuning where none are given."""
    return CPU_SECONDS if device_type == "cpu" else GPU_SECONDS


def sizes_of(budget: float, call_seconds: float, prompts: int) -> Sizes:
    """Return how many prompts and plans a budget is for.

    Args:
        budget: seconds of the whole tuning.
        call_seconds: seconds of a picture of the baseline.
        prompts: number of different ones that there are.

    Raises:
        DiffAccelError: for a budget that is not positive, and fewer than 18 prompts.
    """
    if budget <= 0:
        raise DiffAccelError(f"The budget is {budget:g} seconds; it must be above 0.")
    if prompts < LEAST_TUNING + LEAST_HELD_OUT:
        raise DiffAccelError(
            f"A tuning needs at least {LEAST_TUNING + LEAST_HELD_OUT} different prompts, some to choose by and others "
            f"to test the choice on; got {prompts}."
        )
    pictures = budget / call_seconds
    held_out = min(prompts * 2 // 3, MOST_HELD_OUT, max(LEAST_HELD_OUT, int(0.09 * pictures)))
    top = min(prompts - held_out, MOST_TUNING, max(LEAST_TUNING, int(0.04 * pictures)))
    rungs = sorted({max(4, top // 8), max(4, top // 4), max(5, top // 2), top})
    bracket = 12 if pictures >= 400 else 8 if pictures >= 150 else 4
    return Sizes(tuple(rungs), bracket, held_out, _SEARCH * budget, turns=8 if pictures >= 400 else 6)


def least_seconds(sizes: Sizes, call_seconds: float) -> float:
    """Return about what a tuning of such sizes takes with one bracket, if its plans are as slow as the baseline."""
    rungs, alive = sizes.rungs, sizes.bracket
    pictures = float(rungs[-1] + 3)  # of the baseline
    for before, rung in zip((0, *rungs), rungs, strict=False):
        pictures += alive * (rung - before + 2)  # a call of the baseline before and after
        alive = max(1, alive // 2)
    return call_seconds * (pictures + 2 * (sizes.turns + 1) + 2 * sizes.held_out)


def split(subjects: Sequence[str | None], sizes: Sizes, seed: int) -> dict[str, list[str | None]]:
    """Draw the tuning prompts and the held-out ones: no prompt is in both, nor twice in one."""
    different = list(subjects) if None in subjects else list(dict.fromkeys(subjects))
    random.Random(f"prompts of a tuning {seed}").shuffle(different)
    return {
        "held-out": different[: sizes.held_out],
        "tuning": different[sizes.held_out : sizes.held_out + sizes.rungs[-1]],
    }

"""What the turns of a watched loop have in common: all that a driver must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.families.generic.guidance_rule import GuidanceRule
from diffaccel.families.generic.latents_rule import CONDITION, LatentsRule
from diffaccel.families.generic.row_layout import Layout
from diffaccel.families.generic.time_rule import TimeRule
from diffaccel.families.generic.values import same, scalar
from diffaccel.families.generic.watching import NotIdentified, Turn

NO_TIME = "is no affine map of its scheduler's time"


@dataclass(eq=False)
class Findings:
    """What the turns of one call have in common.

    Attributes:
        constants: all other network arguments, call by call.
        rows: where each of them has its rows.
        row_shape, dtype: of the latents that the scheduler steps.
        answer_shape: of a row of the network's output.
        turned: the pipeline's guidance settings during the call, by attribute.
    """

    denoiser: str
    latents: LatentsRule
    time_arg: str
    time: TimeRule
    guidance: GuidanceRule
    constants: list[dict[str, Any]]
    rows: dict[str, Layout]
    row_shape: torch.Size
    dtype: torch.dtype
    answer_shape: torch.Size
    turned: dict[str, Any]

    def kept(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments that stay the same over the steps."""
        kept = {k: v for k, v in call.items() if k not in (self.latents.arg, self.time_arg)}
        condition = self.latents.condition(call[self.latents.arg], self.row_shape)
        return kept if condition is None else {**kept, CONDITION: condition}

    def cut(self, out: Tensor) -> Tensor:
        """The part of an output that predicts: the first channels or tokens, where others follow."""
        return out if out.shape[1:] == self.row_shape else out[:, : self.row_shape[0]]

    @staticmethod
    def knobs(pipe: Any) -> dict[str, Any]:
        """The pipeline's settings that guidance may depend on."""
        return {k: v for k, v in vars(pipe).items() if k.startswith("_") and ("guidance" in k or "cfg" in k)}

    def predictions(self, turn: Turn) -> list[Tensor]:
        """The network's answers of a turn, one per branch, in the latents' layout."""
        outs = [torch.stack(a).reshape(len(a), *self.row_shape) if isinstance(a, list) else a for a in turn.answers]
        return [branch for out in outs for branch in self.cut(out).chunk(self.latents.copies)]

    def check(self, turn: Turn, step: int) -> None:
        """Raise when a turn is unlike the others."""
        arg = self.latents.arg
        self.guidance.check_count(sum(len(call.get(arg, ())) for call in turn.calls) // len(turn.sample), step)
        for call, constant in zip(turn.calls, self.constants, strict=True):
            self.latents.check(call[arg], turn.sample, step)
            kept = self.kept(call)
            changed = [k for k in kept.keys() | constant.keys() if not same(kept.get(k), constant.get(k))]
            if changed:
                raise NotIdentified(f"its network's argument '{min(changed)}' changes from step to step.")
            time = scalar(call[self.time_arg], self.latents.copies * len(turn.sample))
            if time is None or not self.time.holds(turn.timestep, time):
                raise NotIdentified(
                    f"its network's argument '{self.time_arg}' is no affine map of its scheduler's time."
                )
        self.guidance.check(self.predictions(turn), turn.guided, step)

"""The facts about a watched loop that a driver needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.families.generic.guidance_rule import GuidanceRule
from diffaccel.families.generic.latents_rule import CONDITION, LatentsRule
from diffaccel.families.generic.row_layout import Layout, find_rows
from diffaccel.families.generic.time_rule import TimeRule
from diffaccel.families.generic.values import same, scalar
from diffaccel.families.generic.watching import NotIdentified, Turn

NO_TIME = "is no affine map of its scheduler's time"


@dataclass(eq=False)
class Findings:
    """Facts that hold for all turns of one call.

    Attributes:
        denoiser: attribute of the pipeline that holds the network.
        latents: how the network's input is made of latents.
        time_arg, time: name of the network's time argument, and its map from the scheduler's timestep.
        guidance: how the network's predictions are combined.
        constants: all other network arguments, call by call.
        rows: layout of the rows in each of them.
        row_shape, dtype: of the latents that the scheduler steps.
        answer_shape: shape of a row of the network's output.
        guidance_settings: the pipeline's guidance attributes during the call.
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
    guidance_settings: dict[str, Any]

    def constant_arguments(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return a call's arguments that stay the same over the steps."""
        constants = {k: v for k, v in call.items() if k not in (self.latents.arg, self.time_arg)}
        condition = self.latents.condition(call[self.latents.arg], self.row_shape)
        return constants if condition is None else {**constants, CONDITION: condition}

    def predicted_part(self, out: Tensor) -> Tensor:
        """Return the prediction in an output: the first channels or tokens, where others follow."""
        return out if out.shape[1:] == self.row_shape else out[:, : self.row_shape[0]]

    def predictions(self, turn: Turn) -> list[Tensor]:
        """Return the network's answers of a turn, one per branch, in the latents' layout."""
        outs = [torch.stack(a).reshape(len(a), *self.row_shape) if isinstance(a, list) else a for a in turn.answers]
        return [branch for out in outs for branch in self.predicted_part(out).chunk(self.latents.copies)]

    def check(self, turn: Turn, step: int) -> None:
        """Raise when a turn contradicts the findings."""
        arg = self.latents.arg
        self.guidance.check_count(sum(len(call.get(arg, ())) for call in turn.calls) // len(turn.sample), step)
        for call, constant in zip(turn.calls, self.constants, strict=True):
            self.latents.check(call[arg], turn.sample, step)
            arguments = self.constant_arguments(call)
            changed = [k for k in arguments.keys() | constant.keys() if not same(arguments.get(k), constant.get(k))]
            if changed:
                raise NotIdentified(f"its network's argument '{min(changed)}' changes from step to step.")
            time = scalar(call[self.time_arg], self.latents.copies * len(turn.sample))
            if time is None or not self.time.holds(turn.timestep, time):
                raise NotIdentified(
                    f"its network's argument '{self.time_arg}' is no affine map of its scheduler's time."
                )
        self.guidance.check(self.predictions(turn), turn.guided, step)

    def check_again(self, turn: Turn) -> None:
        """Raise when the first turn of another call, whose constant arguments may be others, contradicts the findings.

        The guidance rule is compared to the bit where it is known so.
        """
        arg, rows = self.latents.arg, self.latents.copies * len(turn.sample)
        if (turn.sample.shape[1:], turn.sample.dtype, len(turn.calls)) != (
            self.row_shape, self.dtype, len(self.constants),
        ):  # fmt: skip
            raise NotIdentified("its latents have another shape or dtype, or its network is called another time.")
        for call, constant in zip(turn.calls, self.constants, strict=True):
            if call.keys() - {arg, self.time_arg} != constant.keys() - {CONDITION} or arg not in call:
                raise NotIdentified("its network has other arguments.")
            self.latents.check(call[arg], turn.sample, 0)
            arguments = self.constant_arguments(call)
            layouts = {k: 0 if k == CONDITION else find_rows(value, rows, k) for k, value in arguments.items()}
            if any(self.rows.get(name) != layout for name, layout in layouts.items()):
                raise NotIdentified("the rows of its network's arguments lie elsewhere.")
            time = scalar(call.get(self.time_arg), rows)
            if time is None or not self.time.holds(turn.timestep, time):
                raise NotIdentified(f"its network's argument '{self.time_arg}' {NO_TIME}.")
        predictions = self.predictions(turn)
        self.guidance.check(predictions, turn.guided, 0)
        if self.guidance.exact and not torch.equal(self.guidance(predictions), turn.guided):
            raise NotIdentified("its predictions are joined with other rounding.")


def read_guidance_settings(pipe: Any) -> dict[str, Any]:
    """Return the pipeline's private attributes that guidance may depend on."""
    return {k: v for k, v in vars(pipe).items() if k.startswith("_") and ("guidance" in k or "cfg" in k)}

"""Inference of findings from the turns of a watched loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffaccel.families.generic.findings import NO_TIME, Findings, read_guidance_settings
from diffaccel.families.generic.guidance_rule import GuidanceRule, fit_guidance
from diffaccel.families.generic.latents_rule import CONDITION, LatentsRule, find_latents
from diffaccel.families.generic.row_layout import find_rows
from diffaccel.families.generic.time_rule import TimeRule, fit_time
from diffaccel.families.generic.values import frozen, same, scalar
from diffaccel.families.generic.watching import DIFFERENT_STEPS, NotIdentified, Turn, watch
from diffaccel.modules.stand_in import TextMemo, signature_of, uncompiled


class LoopAnalysis:
    """An analysis of a loop, turn by turn.

    Attributes:
        turns: the first turns, which the findings are made of.
        count: number of turns so far.
        findings: set when there were enough turns, and checked on all later ones.
        constants: copies of the network's arguments at the first turn, call by call.
        answer_shape: set when the network's output has another row shape than its input, which ends the watching.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.turns: list[Turn] = []
        self.count = 0
        self.findings: Findings | None = None
        self.constants: list[dict[str, Any]] = []
        self.answer_shape: torch.Size | None = None

    def __call__(self, turn: Turn) -> bool:
        """Take the next turn; return whether the loop need not go on."""
        if self.findings is not None:
            self.findings.check(turn, self.count)
        else:
            if not self.turns:
                shape = answer_shape(turn)
                if shape != row_shape_of(turn.answers[0]):
                    self.answer_shape = shape
                    return True
                self.constants = [frozen(call) for call in turn.calls]
            self.turns.append(turn)
            if len(self.turns) == DIFFERENT_STEPS:
                self.findings = self.conclude()
        self.count += 1
        return False

    def conclude(self) -> Findings:
        """Infer findings from the first turns, and check them on each of these."""
        turn = self.turns[0]
        latents, row_shape = find_latents(turn), turn.sample.shape[1:]
        rows = latents.copies * len(turn.sample)
        time_arg, time = self._time_rule(latents, rows)
        findings = Findings(
            turn.denoiser, latents, time_arg, time, GuidanceRule(None, 1), [], {}, row_shape,
            turn.sample.dtype, row_shape_of(turn.answers[0]), read_guidance_settings(self.pipe),
        )  # fmt: skip
        findings.guidance = fit_guidance(findings.predictions(turn), turn.guided)
        findings.constants = [findings.constant_arguments(call) for call in self.constants]
        for constant in findings.constants:
            for name, value in constant.items():
                layout = 0 if name == CONDITION else find_rows(value, rows, name)
                if findings.rows.setdefault(name, layout) != layout:
                    raise NotIdentified(f"its network's argument '{name}' differs in kind between its branches.")
        for step, other in enumerate(self.turns):
            findings.check(other, step)
        return findings

    def _time_rule(self, latents: LatentsRule, rows: int) -> tuple[str, TimeRule]:
        """Return the one argument beside the latents that changes between the turns, and its time rule."""
        calls = [turn.calls[0] for turn in self.turns]
        first_call = self.constants[0]
        changing = [
            name for name in first_call
            if name != latents.arg and not all(same(first_call[name], call.get(name)) for call in calls)
        ]  # fmt: skip
        fits: dict[str, TimeRule | None] = {}
        train = int(self.pipe.scheduler.config.num_train_timesteps)
        for name in changing:
            times = [time for call in calls if (time := scalar(call.get(name), rows)) is not None]
            if len(times) == len(calls):
                fits[name] = fit_time([turn.timestep for turn in self.turns], times, train)
        rules = [(name, rule) for name, rule in fits.items() if rule is not None]
        others = [name for name in changing if name not in [followed for followed, _ in rules[:1]]]
        if others:
            reason = NO_TIME if others[0] in fits and not rules else "changes from step to step"
            raise NotIdentified(f"its network's argument '{others[0]}' {reason}.")
        if not rules:
            raise NotIdentified("none of its network's arguments follows its scheduler's time.")
        return rules[0]


def study(
    pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo, is_second: bool = False
) -> Findings:
    """Watch a call and infer the facts that hold for all of its turns.

    A call of fewer than three steps is watched again with more steps (``is_second``), since two points always lie on a
    line.
    """
    analysis = LoopAnalysis(pipe)
    watch(pipe, call, arguments, memo, analysis)
    if analysis.answer_shape is not None:
        shape, analysis = analysis.answer_shape, LoopAnalysis(pipe)
        watch(pipe, call, arguments, memo, analysis, shape)
    if analysis.findings is not None:
        return analysis.findings
    steps = arguments.get("num_inference_steps")
    if is_second or not isinstance(steps, int):
        raise NotIdentified(f"its loop makes {analysis.count} steps only; {DIFFERENT_STEPS} would tell its rules.")
    overrides = {"num_inference_steps": DIFFERENT_STEPS * steps, "sigmas": None, "timesteps": None}
    longer = {**arguments, **{k: v for k, v in overrides.items() if k in arguments}}
    findings = study(pipe, call, longer, memo, is_second=True)
    for step, turn in enumerate(analysis.turns):
        findings.check(turn, step)
    return findings


def answer_shape(turn: Turn) -> torch.Size:
    """Return the shape of a row of the network's output.

    It is that of the latents, with the tokens of other pictures where the input has them, or with twice the channels
    where the network predicts a variance.
    """
    rule, row_shape = find_latents(turn), turn.sample.shape[1:]
    network = uncompiled(turn.network)
    if "return_dict" not in signature_of(network).parameters:
        raise NotIdentified(f"its '{turn.denoiser}' has no argument 'return_dict'.")
    if hasattr(network, "_cp_config") or hasattr(network, "_cp_shard_fn"):
        raise NotIdentified(f"its '{turn.denoiser}' is split over devices by context parallelism.")
    if rule.item_shape is not None:
        return rule.item_shape
    if turn.sample.ndim == 3 and rule.axis == 1:
        return turn.calls[0][rule.arg].shape[1:]
    channels = getattr(getattr(network, "config", None), "out_channels", None)
    if turn.sample.ndim > 3 and channels == 2 * row_shape[0]:
        return torch.Size((channels, *row_shape[1:]))
    return row_shape


def row_shape_of(answer: Any) -> torch.Size:
    """Return the shape of one row of a network's output."""
    return answer[0].shape if isinstance(answer, list) else answer.shape[1:]

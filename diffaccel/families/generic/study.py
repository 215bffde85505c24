"""From a watched loop, turn by turn, to findings about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffaccel.families.generic.findings import NO_TIME, Findings
from diffaccel.families.generic.guidance_rule import GuidanceRule, fit_guidance
from diffaccel.families.generic.latents_rule import CONDITION, LatentsRule, find_latents
from diffaccel.families.generic.row_layout import find_rows
from diffaccel.families.generic.time_rule import TimeRule, fit_time
from diffaccel.families.generic.values import frozen, same, scalar
from diffaccel.families.generic.watching import DIFFERENT_STEPS, NotIdentified, Turn, watch
from diffaccel.modules.stand_in import TextMemo, signature_of, uncompiled


class Student:
    """Takes the turns of a loop one by one; ``found`` when there were enough of them.

    ``answer_shape`` is set, and the watching ended, when the network would answer in another shape than its input's.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.turns: list[Turn] = []
        self.count = 0
        self.found: Findings | None = None
        self.first: list[dict[str, Any]] = []
        self.answer_shape: torch.Size | None = None

    def __call__(self, turn: Turn) -> bool:
        if self.found is not None:
            self.found.check(turn, self.count)
        else:
            if not self.turns:
                shape = answer_shape(turn)
                if shape != row_of(turn.answers[0]):
                    self.answer_shape = shape
                    return True
                self.first = [frozen(call) for call in turn.calls]
            self.turns.append(turn)
            if len(self.turns) == DIFFERENT_STEPS:
                self.found = self.conclude()
        self.count += 1
        return False

    def conclude(self) -> Findings:
        """What the first turns show, checked on each of them."""
        turn = self.turns[0]
        latents, row_shape = find_latents(turn), turn.sample.shape[1:]
        rows = latents.copies * len(turn.sample)
        time_arg, time = self._time(latents, rows)
        found = Findings(
            turn.denoiser, latents, time_arg, time, GuidanceRule(None, 1), [], {}, row_shape,
            turn.sample.dtype, row_of(turn.answers[0]), Findings.knobs(self.pipe),
        )  # fmt: skip
        found.guidance = fit_guidance(found.predictions(turn), turn.guided)
        found.constants = [found.kept(call) for call in self.first]
        for constant in found.constants:
            for name, value in constant.items():
                layout = 0 if name == CONDITION else find_rows(value, rows, name)
                if found.rows.setdefault(name, layout) != layout:
                    raise NotIdentified(f"its network's argument '{name}' differs in kind between its branches.")
        for step, other in enumerate(self.turns):
            found.check(other, step)
        return found

    def _time(self, latents: LatentsRule, rows: int) -> tuple[str, TimeRule]:
        calls = [turn.calls[0] for turn in self.turns]
        changing = [
            name for name in self.first[0]
            if name != latents.arg and not all(same(self.first[0][name], call.get(name)) for call in calls)
        ]  # fmt: skip
        found: dict[str, TimeRule | None] = {}
        train = int(self.pipe.scheduler.config.num_train_timesteps)
        for name in changing:
            times = [time for call in calls if (time := scalar(call.get(name), rows)) is not None]
            if len(times) == len(calls):
                found[name] = fit_time([turn.timestep for turn in self.turns], times, train)
        rules = [(name, rule) for name, rule in found.items() if rule is not None]
        others = [name for name in changing if name not in [followed for followed, _ in rules[:1]]]
        if others:
            why = NO_TIME if others[0] in found and not rules else "changes from step to step"
            raise NotIdentified(f"its network's argument '{others[0]}' {why}.")
        if not rules:
            raise NotIdentified("none of its network's arguments follows its scheduler's time.")
        return rules[0]


def study(
    pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo, few: bool = False
) -> Findings:
    """Watch a call and say what its turns have in common.

    A call of fewer than three steps is watched a second time with more of them, since two points always lie on a line;
    ``few`` says that this is that time.
    """
    student = Student(pipe)
    watch(pipe, call, arguments, memo, student)
    if student.answer_shape is not None:
        shape, student = student.answer_shape, Student(pipe)
        watch(pipe, call, arguments, memo, student, shape)
    if student.found is not None:
        return student.found
    steps = arguments.get("num_inference_steps")
    if few or not isinstance(steps, int):
        raise NotIdentified(f"its loop makes {student.count} steps only; {DIFFERENT_STEPS} would tell its rules.")
    more = {"num_inference_steps": DIFFERENT_STEPS * steps, "sigmas": None, "timesteps": None}
    found = study(pipe, call, {**arguments, **{k: v for k, v in more.items() if k in arguments}}, memo, few=True)
    for step, turn in enumerate(student.turns):
        found.check(turn, step)
    return found


def answer_shape(turn: Turn) -> torch.Size:
    """The shape of a row of the network's output: that of the latents, with the tokens of other pictures where the
    input has them, or with a variance for each channel."""
    rule, row = find_latents(turn), turn.sample.shape[1:]
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
    if turn.sample.ndim > 3 and channels == 2 * row[0]:
        return torch.Size((channels, *row[1:]))
    return row


def row_of(answer: Any) -> torch.Size:
    return answer[0].shape if isinstance(answer, list) else answer.shape[1:]

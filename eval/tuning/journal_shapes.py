"""The shapes of what a tuning's journal keeps, so that an edited or damaged one is told by its part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.errors import first_line
from diffaccel.files import COUNT, NUMBER, misfit

BRACKET, SETTINGS, TURNS = "bracket", "settings", "turns of the "
_RESULT_KEY = re.compile(r".* on (tuning|held-out)-(\d+)-(\d+)", re.DOTALL)  # of a plan on a part of the prompts
_VALUES: dict[str, Any] = {
    SETTINGS: dict, "call seconds": NUMBER, "warm seconds": NUMBER, "brackets": COUNT, "chosen": dict,
}  # fmt: skip
_RESULT: dict[str, Any] = {"spent": NUMBER, "cost": dict, "values": dict}
_RATIO = {"tuning": NUMBER, "held-out": (NUMBER, None)}
_TURNS = {"spent": NUMBER, "baseline": NUMBER, "plans": dict}
_BOUNDED, _POINT = {"value": NUMBER, "low": NUMBER, "high": NUMBER}, {"value": NUMBER, "low": None, "high": None}
_TIMING = {"seconds": NUMBER, "ratio": (_BOUNDED, _POINT)}
_STATES = ("RUNNING", "COMPLETE", "FAIL")
_TIMED = ("seconds", "speedup")  # metrics that come from the ratio


def misfit_of_values(values: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Return which part of the values is not as a tuning puts it; empty where all are.

    Args:
        values: by key, as they were read.
        metrics: of the gate, each of which every result must have.
    """
    return next(filter(None, (_misfit_of_value(key, value, metrics) for key, value in values.items())), "")


def _misfit_of_value(key: str, value: Any, metrics: Sequence[str]) -> str:
    if key in _VALUES:
        return misfit(value, _VALUES[key], key)
    if key.startswith(TURNS):
        return misfit(value, _TURNS, key) or _misfit_of_each(value["plans"], _TIMING, f"{key}.plans")
    found = _RESULT_KEY.fullmatch(key)
    if found is None:
        return misfit(value, {"spent?": NUMBER}, key) if isinstance(value, dict) else ""
    if isinstance(value, dict) and value.get("refused"):
        return misfit(value, {"spent": NUMBER, "refused": str}, key)
    part = misfit(value, {**_RESULT, "ratio": _RATIO[found[1]]}, key)
    part = part or _misfit_of_each(value["cost"], NUMBER, f"{key}.cost")
    part = part or _misfit_of_each(value["values"], [(NUMBER, float)], f"{key}.values")  # equal pictures: PSNR is inf
    if part:
        return part
    count, known = int(found[3]) - int(found[2]), {*value["values"], *value["cost"], *_TIMED}
    wrong = [metric for metric, numbers in value["values"].items() if len(numbers) != count]
    wrong += [metric for metric in metrics if metric not in known]
    return f"{key}.values.{wrong[0]}" if wrong else ""


def _misfit_of_each(values: Mapping[str, Any], shape: Any, name: str) -> str:
    return next(filter(None, (misfit(value, shape, f"{name}.{key}") for key, value in values.items())), "")


def misfit_of_trials(trials: Sequence[Any]) -> str:
    """Return which part of a study's trials is not as a tuning leaves it; empty where all are."""
    return next(filter(None, map(_misfit_of_trial, trials)), "")


def _misfit_of_trial(trial: Any) -> str:
    name = f"trial {trial.number}"
    if trial.state.name not in _STATES:
        return f"{name}.state"
    if trial.state.name == "COMPLETE" and (misfit(trial.values, [NUMBER]) or len(trial.values) != 2):
        return f"{name}.values"
    part = misfit(trial.user_attrs, {f"{BRACKET}?": COUNT}, name) or misfit(trial.system_attrs, dict, name)
    if part:
        return part
    promises = {key: value for key, value in trial.system_attrs.items() if key.startswith("constraints:")}
    return _misfit_of_each(promises, NUMBER, name)


def misfit_of_points(trials: Sequence[Any], distributions: Mapping[str, Any]) -> str:
    """Return which trial has parameters that are not of these distributions; empty where all that count are."""
    import optuna

    for trial in trials:
        if trial.state.name != "COMPLETE" and BRACKET not in trial.user_attrs:
            continue  # killed as it was asked
        try:
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING, params=trial.params, distributions=dict(distributions)
            )
        except Exception as error:  # of values of any kind
            return f"trial {trial.number}.params ({first_line(error)})"
    return ""

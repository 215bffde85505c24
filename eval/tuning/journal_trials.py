"""What the trials that a tuning's journal keeps must have, so that an edited or damaged one is told by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.eval.tuning.journal_values import wrong

BRACKET = "bracket"
_STATES = ("RUNNING", "COMPLETE", "FAIL")


def damage_of_trials(trials: Sequence[Any]) -> str:
    """Return what is wrong with the first trial of a study that is not as a tuning leaves it; empty where all are."""
    return next((text for trial in trials for text in _problems(trial)), "")


def _problems(trial: Any) -> list[str]:
    place = f"trial {trial.number}"
    attributes = (("user_attrs", trial.user_attrs), ("system_attrs", trial.system_attrs))
    if found := [text for name, value in attributes for text in wrong(value, f"{name} of {place}", "an object")]:
        return found
    if trial.state.name not in _STATES:
        return [f"the state of {place} is {trial.state.name}, and must be {', '.join(_STATES)}"]
    if BRACKET in trial.user_attrs:
        found += wrong(trial.user_attrs[BRACKET], f"the bracket of {place}", "a whole number, 0 or more")
    for name, value in trial.system_attrs.items():
        if name.startswith("constraints:"):
            found += wrong(value, f"'{name}' of {place}", "a number")
    if trial.state.name == "COMPLETE":
        values = trial.values
        if not isinstance(values, list) or len(values) != 2:
            return [f"the values of {place} are {values}, and must be two numbers"]
        found += [text for value in values for text in wrong(value, f"a value of {place}", "a number")]
    return found


def misfit_of_trials(trials: Sequence[Any], distributions: Mapping[str, Any]) -> str:
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
            return f"the parameters of trial {trial.number} are not those of this tuning ({error})"
    return ""

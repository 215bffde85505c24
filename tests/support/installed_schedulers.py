"""Every installed diffusers scheduler, after ``set_timesteps``, with every config variant its constructor knows."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import diffusers
import pytest

from diffaccel.schedules import FLOW_STATE, VE_STATE, VP_STATE

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = 10
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# Every scheduler is tried with each of these whose options its constructor has.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_lu_lambdas": True},
    {"interpolation_type": "log_linear"},
    {"final_sigmas_type": "sigma_min"},
    {"set_alpha_to_one": False},
    {"skip_prk_steps": True},
    {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    {**FLOW, "flow_shift": 3.0},
    {**FLOW, "use_karras_sigmas": True},
    {**FLOW, "use_dynamic_shifting": True, "mu": 0.8},
    {**FLOW, "shift_terminal": 0.1},
]
FLOW_VARIANTS: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    {"use_dynamic_shifting": True, "mu": 0.8},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "mu": 0.8},
    {"shift_terminal": 0.1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"stochastic_sampling": True},
]


def scheduler_class(name: str) -> Any:
    return getattr(diffusers, name)


def make(name: str, steps: int = STEPS, **config: Any) -> Any:
    """Make a scheduler after ``set_timesteps``; skip the test where an optional dependency of diffusers is missing."""
    return copy.deepcopy(_make_once(name, steps, tuple(config.items())))


@functools.cache
def _make_once(name: str, steps: int, items: tuple[tuple[str, Any], ...]) -> Any:
    config = dict(items)
    mu = {"mu": config.pop("mu")} if "mu" in config else {}
    options = inspect.signature(scheduler_class(name).__init__).parameters
    for key, value in {**TRAINED, "clip_sample": False}.items():
        if key in options:
            config.setdefault(key, value)
    try:
        scheduler = scheduler_class(name)(**config)
    except ImportError as error:
        pytest.skip(" ".join(str(error).split()))
    scheduler.set_timesteps(steps, **mu)
    return scheduler


def cases(names: set[str], variants: list[dict[str, Any]]) -> list[Any]:
    params = []
    for name in sorted(names):
        options = inspect.signature(scheduler_class(name).__init__).parameters
        for variant in variants:
            if set(variant) - {"mu"} <= set(options):
                label = " ".join(f"{k}={v}" for k, v in variant.items())
                params.append(pytest.param(name, variant, id=f"{name} {label}".strip()))
    return params


TRAINED_CASES = cases(VE_STATE | VP_STATE, [v for v in VARIANTS if "use_flow_sigmas" not in v])
ALL = [
    *TRAINED_CASES,
    *cases(VP_STATE, [v for v in VARIANTS if "use_flow_sigmas" in v]),
    *cases(FLOW_STATE, FLOW_VARIANTS),
]

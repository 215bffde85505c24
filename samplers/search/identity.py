"""Everything that the rewards of a search depend on, JSON-ready: the header of its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffaccel.config import SamplerConfig
from diffaccel.samplers.rewards import Reward, digest, weights
from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.plan import SearchPlan
from diffaccel.session import Session

NEUTRAL_OPTIONS = (
    "max_batch",
    "reward_device",
    "keep",
    "folder",
    "shared",
    "watch",
)  # no decision of a search depends on them
# of a call: its prompts and its generator, which have entries of their own, and what happens after the search
NEUTRAL_ARGUMENTS = (
    "prompt", "generator", "output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)  # fmt: skip


def identity(
    config: SamplerConfig, session: Session, searches: Sequence[Search], plan: SearchPlan, reward: Reward
) -> dict[str, Any]:
    """Return the method's options, the call's arguments, the weights, the reward, prompts, seeds and noise levels."""
    options = {option: value for option, value in config.to_dict().items() if option not in NEUTRAL_OPTIONS}
    arguments = {
        name: value if isinstance(value, bool | int | float | str) else digest(value)
        for name, value in session.conds[0].arguments.items()
        if name not in NEUTRAL_ARGUMENTS and value is not None
    }
    networks = {
        name: weights(part)
        for name, part in getattr(session.pipe, "components", {}).items()
        if isinstance(part, nn.Module)
    }
    beside: dict[str, Any] = {"beside": list(session.beside)} if session.beside else {}
    return {
        **beside,
        "method": options,
        "call": arguments,
        "weights": networks,
        "reward": reward.fingerprint(),
        "prompts": [search.prompt for search in searches],
        "seeds": [search.seed for search in searches],
        "scheduler": type(session.scheduler).__name__,
        "timesteps": session.timesteps.tolist(),
        "sigmas": list(plan.sigmas),
        "dtype": str(session.dtype).removeprefix("torch."),
    }


def differing(stored: dict[str, Any], header: dict[str, Any]) -> str:
    """Name what differs between two headers, options and arguments by their own names."""
    names: list[str] = []
    for key in {**stored, **header}:
        old, new = stored.get(key), header.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            parts = [part for part in {**old, **new} if old.get(part) != new.get(part)]
            names += [f"the weights of {part}" if key == "weights" else part for part in parts]
        else:
            names.append(key)
    return ", ".join(dict.fromkeys(names))

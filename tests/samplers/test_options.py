"""Every option of every sampler changes the result, or is refused where it would not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import tiny
import torch
from analytic import BIMODAL, sample
from analytic import start as noise
from search_bed import Found, found, latent_reward, stand_in
from torch import Tensor

import diffaccel
from diffaccel import registry
from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SMC, SVDD, Ancestral, BoN, CoDe, SoP

# Options that no result depends on: how many rows go into a call, where work is done, which files are left; and how
# pictures are decoded, which rewards of latents do not see.
NEUTRAL = {"max_batch", "reward_device", "folder", "shared", "wave", "preview", "watch"}
ON_CALLS = {"population"}  # for several images of a prompt: tests/samplers/search/test_population.py
ON_PIPELINES = {"state", "guidance_stop"}  # of the driver, which rounds by it, and has guidance
ELSEWHERE = {"bottleneck", "drafts", "superdiff"}  # whose rules have options of their own: tests/samplers/NAME
LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])


def total(x0: Tensor) -> Tensor:
    return x0.flatten(1).double().sum(1)


REWARD = latent_reward(total, differentiable=True)
OTHER = latent_reward(lambda x0: -total(x0), differentiable=True)
SEARCH = {"reward": ({}, OTHER), "budget": ({}, 90), "guide": ({}, 0.1), "keep": ({}, 1), "draw": ({}, 1e6)}
PATH = {
    "path": ({}, "linear"), "kernel": ({"path": "linear", "norm": 0.5}, "em"),
    "scale": ({"path": "linear", "norm": 0.5}, "sine"), "norm": ({}, 0.5), "stages": ({"path": "vp"}, 5),
    "tail_steps": ({"path": "vp"}, 3), "score_from": ({}, 0.4), "score_to": ({}, 0.4), "score_every": ({}, 3),
}  # fmt: skip
RULE = {"rule": "threshold", "threshold": 0.0}
ONE_NOISE = {"preset": ({}, "paper"), "one_noise": ({}, True)}
ONE = {"beam": 1, "chunk": 1}
# for every option: options beside which it has another value than its default, and that value
EFFECTS: dict[str, dict[str, tuple[dict[str, Any], Any]]] = {
    "ancestral": {"eta": ({}, 0.5)},
    "bon": SEARCH,
    "sop": SEARCH | {
        "preset": ({}, "paper"), "top": ({}, "all"),
        "particles": ({}, 1), "walk": ({}, 2), "seed_level": ({}, 0.1), "forward": ({}, 0.7), "backward": ({}, 0.84),
    },
    "smc": SEARCH | PATH | {
        "preset": ({}, "paper"), "temperature": ({}, 0.05), "potential": ({}, "sum"), "resample": ({}, 1.0),
    },
    "svdd": SEARCH | PATH | ONE_NOISE | {"particles": ({}, 1), "temperature": ({}, 5.0)},
    "code": SEARCH | PATH | ONE_NOISE | {"particles": ({}, 1), "block": ({}, 3)},
    "rbf": SEARCH | PATH | {
        "preset": ({"budget": 90}, "paper"),
        "particles": ({}, 1), "initial": ({}, 2), "beam": ({"budget": 120}, 1), "begin": ({}, 0.4),
        "chunk": ({"beam": 1}, 1), "commit": ({"chunk": 4}, "first"),
        "against": (ONE | {"budget": 60, "initial": 16}, "last_accepted"), "rule": (RULE, "rollover"),
        "threshold": (RULE, 5.0), "leftover": (ONE, "spread"), "cap": (ONE, 0),
    },
}  # fmt: skip
CONFIGS = {
    name: cls for name in registry.METHODS if (cls := registry.config_class(name)).touches == "loop"
}  # options of caches: tests/samplers/caches


def search(config: Any) -> Found:
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    return found(config, stand_in(x, LEVELS), lambda x, sigma: BIMODAL.velocity(LINEAR, x, sigma))


def outcome(config: Any) -> Any:
    """The samples, and of a search its rewards and decisions."""
    if not config.searches:
        levels, generators = LEVELS, [torch.Generator().manual_seed(i) for i in range(3)]
        return sample(config, BIMODAL, noise(LINEAR, 1.0), levels, LINEAR, generators).x.tolist()
    run = search(config)
    return [run.x.tolist(), run.decisions, [picture["rewards"] for picture in run.pictures]]


def with_reward(name: str, options: dict[str, Any]) -> Any:
    return CONFIGS[name](**({"reward": REWARD, "budget": 100} if CONFIGS[name].searches else {}) | options)


@pytest.mark.parametrize("name", EFFECTS)
def test_every_option_changes_the_result(name: str) -> None:
    for option, (beside, value) in EFFECTS[name].items():
        changed = {} if option == "rule" else beside | {option: value}  # the rules have options of their own
        assert outcome(with_reward(name, beside)) != outcome(with_reward(name, changed)), f"{name}.{option}"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ELSEWHERE])
def test_no_option_is_forgotten(name: str) -> None:
    options = {field.name for field in fields(CONFIGS[name])}
    assert options == EFFECTS.get(name, {}).keys() | (options & (NEUTRAL | ON_CALLS)) | ON_PIPELINES
    assert not EFFECTS.get(name, {}).keys() & NEUTRAL


@pytest.mark.parametrize("name", [name for name, cls in CONFIGS.items() if not cls.searches and name != "scheduler"])
def test_the_state_of_a_pipeline_in_half_precision(name: str) -> None:
    images = []
    pipe = tiny.make("flux").to(torch.bfloat16)
    for state in ("float32", "stock"):
        diffaccel.accelerate(pipe, CONFIGS[name](state=state))
        images.append(pipe(**tiny.call_kwargs("flux", steps=3)).images)
        diffaccel.remove(pipe)
    assert not torch.equal(*images)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: RBF(stages=8), r"RBF\.stages is 8, which has no effect: the path 'native' has the call's own levels"),
        (lambda: SVDD(path="linear", tail_steps=2), r"tail_steps is 2, .* Set path='vp', or leave tail_steps out"),
        (lambda: SMC(scale="sigma"), r"SMC\.scale is 'sigma', which has no effect: the path 'native' has DDPM's noise"),
        (lambda: CoDe(norm=3.0), r"CoDe\.norm is 3; on the path 'native' it is a share of DDPM's noise, at most 1"),
        (lambda: RBF(threshold=0.5), r"RBF\.threshold is 0\.5, which has no effect: the rule 'rollover' has none"),
        (lambda: RBF(**RULE, leftover="spread"), r"leftover is 'spread', which has no effect: the rule 'threshold'"),
        (lambda: RBF(**RULE, cap=3), r"RBF\.cap is 3, which has no effect"),
        (lambda: RBF(**RULE, against="last_accepted"), r"RBF\.against is 'last_accepted', which has no effect"),
        (lambda: Ancestral(eta=2.0), "eta"),
        (lambda: BoN(state="stock"), "float32"),
        (lambda: SoP(state="stock"), "float32"),
        (lambda: CONFIGS["scheduler"](state="float32"), "stock"),
    ],
)
def test_what_would_have_no_effect_is_refused(make: Any, why: str) -> None:
    with pytest.raises(DiffAccelError, match=why):
        make()

"""A digest of what a reward's numbers depend on: the same in every process, another where anything differs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffaccel.samplers import rewards
from diffaccel.samplers.rewards import digest, weights

ROOT = Path(__file__).resolve().parents[3]
SOURCE = """
import functools
import torch
SCALE = {scale}
def helper(x):
    return x * SCALE
def reward(images, prompts, power={power}):
    return [helper(image.mean()) ** power for image in images]
class Object:
    def __init__(self, weight):
        self.weight, self.table = weight, {{"a": 1, "b": {{2, 3}}}}
    def __call__(self, images, prompts):
        return images.mean() {sign} self.weight
layer = torch.nn.Linear(2, 1)
torch.nn.init.constant_(layer.weight, {weight})
torch.nn.init.zeros_(layer.bias)
ALL = [reward, functools.partial(reward, power=3), Object({weight}), Object({weight}).__call__, layer,
       functools.lru_cache(helper), (lambda k: lambda images, prompts: k * images)({scale})]
"""
PLAIN = {"scale": 2, "power": 1, "sign": "+", "weight": 0.5}


def made(**changes: Any) -> list[Any]:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(compile(SOURCE.format(**{**PLAIN, **changes}), "mine.py", "exec"), names)
    return [digest(value) for value in names["ALL"]]


@pytest.mark.parametrize(
    "changes, touched",
    [
        ({"scale": 3}, [True, True, False, False, False, True, True]),
        ({"power": 2}, [True, True, False, False, False, False, False]),
        ({"sign": "-"}, [False, False, True, True, False, False, False]),
        ({"weight": 0.25}, [False, False, True, True, True, False, False]),
    ],
)
def test_code_options_globals_closures_and_weights(changes: dict[str, Any], touched: list[bool]) -> None:
    assert [one != other for one, other in zip(made(), made(**changes), strict=True)] == touched
    assert made() == made()


@pytest.mark.slow
def test_another_process_has_the_same_digests(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE.format(**PLAIN))
    code = (
        "import mine\nfrom diffaccel.samplers import rewards\n"
        "print(*(rewards.digest(value) for value in mine.ALL))\n"
        "print(rewards.resolve('clip:emoji-clip-reward + 2*compress', device='cpu').fingerprint())"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    named = rewards.resolve("clip:emoji-clip-reward + 2*compress", device="cpu")
    assert run.stdout.split() == [*made(), named.fingerprint()] and len(set(made())) == 7


def test_a_stated_identity_counts_alone() -> None:
    class Counting:
        identity = "counts things, version 2"

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, images: Any, prompts: Any) -> Any:
            self.calls += 1
            return images.flatten(1).mean(1)

    reward = Counting()
    before = rewards.resolve(reward, device="cpu").fingerprint()
    reward(torch.zeros(1, 3, 2, 2), ["a"])
    assert rewards.resolve(reward, device="cpu").fingerprint() == before
    reward.identity = "counts things, version 3"
    assert rewards.resolve(reward, device="cpu").fingerprint() != before


def test_sums_and_their_parameters() -> None:
    names = ["compress", "compress:90", "2*compress", "compress + compress:90", "compress - compress:90"]
    prints = [rewards.resolve(name, device="cpu").fingerprint() for name in names]
    assert len(set(prints)) == len(prints)
    two, three = (rewards.counts(lambda images, things: np.zeros((len(images), 1)), {"cat": n}) for n in (2, 3))
    assert two.fingerprint() != three.fingerprint()


def test_every_weight_counts() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Linear(7, 300))
    before = weights(network)
    assert weights(network) == before
    with torch.no_grad():
        for tensor in network.state_dict().values():
            kept = tensor.clone()
            tensor.view(-1)[-1] += 1
            assert weights(network) != before
            tensor.copy_(kept)
    assert weights(network) == before
    assert weights(network.to(torch.bfloat16)) != before
    scaled: Any = torch.nn.Linear(1, 1)
    plain = weights(scaled)
    scaled.scaling = {"default": 0.5}
    assert weights(scaled) != plain


def test_what_refers_to_itself_and_what_has_no_digest_of_its_own() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert digest(loop) == digest(loop) != digest([1, [1]])
    assert digest(object()) == digest(object())
    assert digest(functools.partial(max, 1)) != digest(functools.partial(max, 2))

"""A copy of a tiny pipeline is the pipeline that would be made anew, and shares nothing with the next copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import tiny_more
import torch
from made_once import copied, made_once
from torch import nn

MAKERS = {"flux": tiny.flux, "sd": tiny._sd, "hunyuan": tiny_more.hunyuan, "cogvideox": tiny_more.cogvideox}


def tensors(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("family", MAKERS)
def test_a_copy_is_a_new_pipeline(family: str) -> None:
    make: Any = MAKERS[family]
    new, state = make.__wrapped__(), torch.get_rng_state()
    one, other = make(), make()
    assert torch.equal(torch.get_rng_state(), state)
    of_new, of_one, of_other = map(tensors, (new, one, other))
    assert of_one.keys() == of_new.keys() and len(of_one) > 50
    assert all(torch.equal(value, of_new[key]) for key, value in of_one.items())
    assert not {value.data_ptr() for value in of_one.values()} & {value.data_ptr() for value in of_other.values()}
    for name, part in one.components.items():
        assert type(part) is type(new.components[name])
        if hasattr(part, "config"):
            assert part is not other.components[name] and str(part.config) == str(new.components[name].config)


def test_what_one_does_to_a_copy_no_other_sees() -> None:
    one, other = tiny.make("flux"), tiny.make("flux")
    one.transformer.register_forward_hook(lambda *_: None)
    one.scheduler.register_to_config(shift=9.0)
    one.vae.encoder.conv_in.extra = 1
    with torch.no_grad():
        one.transformer.x_embedder.weight.zero_()
    for pipe in (other, tiny.make("flux")):
        assert not pipe.transformer._forward_hooks and pipe.scheduler.config.shift != 9.0
        assert not hasattr(pipe.vae.encoder.conv_in, "extra") and bool(pipe.transformer.x_embedder.weight.any())


def test_modules_are_copied_as_deepcopy_copies_them() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[2].weight = module[0].bias  # tied
    module.back = [module[0], {"again": module[0]}]
    module[1].weight.requires_grad_(False)
    for new in (copied(module), copy.deepcopy(module)):
        assert new[2].weight is new[0].bias is not module[0].bias
        assert new.back[0] is new[0] is new.back[1]["again"] is not module[0]
        assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in module.parameters()]
        assert [*new.state_dict()] == [*module.state_dict()]


def test_objects_as_arguments_are_never_kept() -> None:
    made = []
    make = made_once(lambda *args, **kwargs: made.append((args, kwargs)) or [])
    assert make(1) is not make(1) and len(made) == 1
    make(True), make("1"), make(1, size=2), make(size=2)
    assert len(made) == 5
    scheduler = tiny.ddim()
    make(scheduler), make(scheduler)
    assert len(made) == 7

"""accelerate, remove, summary, load: order, refusals, and a pipe that stays the user's own."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, FluxPipeline

import diffaccel
from diffaccel.config import Config
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Euler, Heun


@dataclass(frozen=True, kw_only=True)
class Halve(Config):
    """A weight method for these tests: halves the output projection."""

    name: ClassVar[str] = "halve"
    touches: ClassVar[Any] = "weights"
    fail: bool = False

    def apply(self, pipe: Any) -> Any:
        if self.fail:
            raise DiffAccelError("halve fails on purpose.")
        weight = pipe.transformer.proj_out.weight
        original = weight.detach().clone()
        weight.data.mul_(0.5)
        APPLIED.append("halve")

        class Handle:
            def remove(self) -> None:
                weight.data.copy_(original)
                APPLIED.append("-halve")

        return Handle()


@dataclass(frozen=True, kw_only=True)
class Hook(Config):
    """A block method for these tests: negates the network's output."""

    name: ClassVar[str] = "hook"
    touches: ClassVar[Any] = "blocks"
    conflicts: ClassVar[tuple[str, ...]] = ("heun",)

    def apply(self, pipe: Any) -> Any:
        APPLIED.append("hook")
        return pipe.transformer.proj_out.register_forward_hook(lambda module, args, out: -out)


APPLIED: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    APPLIED.clear()


def run(pipe: Any) -> torch.Tensor:
    return pipe(**tiny.call_kwargs("flux")).images


def test_methods_are_applied_weights_then_blocks_then_loop_and_removed() -> None:
    pipe = tiny.make("flux")
    stock = run(pipe)
    assert diffaccel.accelerate(pipe, Euler(), Hook(), Halve()) is pipe
    assert APPLIED == ["halve", "hook"]
    assert [m["name"] for m in diffaccel.summary(pipe).methods] == ["halve", "hook", "euler"]
    assert not torch.equal(run(pipe), stock)
    assert diffaccel.remove(pipe) is pipe
    assert torch.equal(run(pipe), stock) and type(pipe) is FluxPipeline and "_diffaccel" not in pipe.__dict__


def test_methods_can_be_added_one_by_one() -> None:
    pipe = tiny.make("flux")
    diffaccel.accelerate(diffaccel.accelerate(pipe, "euler"), Halve())
    assert [m["name"] for m in diffaccel.summary(pipe).methods] == ["halve", "euler"]


def test_a_method_that_fails_leaves_the_others_untouched() -> None:
    pipe = tiny.make("flux")
    stock = run(pipe)
    with pytest.raises(DiffAccelError, match="on purpose"):
        diffaccel.accelerate(pipe, Hook(), Halve(fail=True))
    assert torch.equal(run(pipe), stock) and type(pipe) is FluxPipeline
    diffaccel.accelerate(pipe, Hook())
    hooked = run(pipe)
    with pytest.raises(DiffAccelError, match="on purpose"):
        diffaccel.accelerate(pipe, Halve(fail=True))
    assert torch.equal(run(pipe), hooked)


@pytest.mark.parametrize(
    ("configs", "match"),
    [
        ((Euler(), Heun()), "'euler' and 'heun' both replace the sampling loop"),
        ((Euler(), Euler()), "'euler' is already active"),
        ((Hook(), Heun()), "'hook' and 'heun' cannot be active together"),
        (("eulr",), "Did you mean 'euler'"),
        ((Euler,), r"pass an instance: Euler\(\)"),
        ((3,), "no config of a method"),
        ((), "needs at least one method"),
    ],
)
def test_refusals_name_what_clashes(configs: tuple, match: str) -> None:
    pipe = tiny.make("flux")
    with pytest.raises(DiffAccelError, match=match):
        diffaccel.accelerate(pipe, *configs)
    assert type(pipe) is FluxPipeline and "_diffaccel" not in pipe.__dict__


def test_clashes_with_what_is_active_already() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), "euler")
    with pytest.raises(DiffAccelError, match="both replace the sampling loop"):
        diffaccel.accelerate(pipe, "heun")


def test_only_pipelines_and_one_at_a_time() -> None:
    with pytest.raises(DiffAccelError, match="Linear; pass a diffusers pipeline"):
        diffaccel.accelerate(torch.nn.Linear(1, 1), "euler")
    with pytest.raises(DiffAccelError, match="none of the methods composes several"):
        diffaccel.accelerate([tiny.make("flux"), tiny.make("flux")], "euler")


def test_the_pipe_stays_what_it_was(tmp_path) -> None:
    pipe = tiny.make("flux")
    signature, text = inspect.signature(pipe.__call__), repr(pipe)
    diffaccel.accelerate(pipe, "euler")
    assert isinstance(pipe, FluxPipeline) and type(pipe).__name__ == "FluxPipeline"
    assert inspect.signature(pipe.__call__) == signature and repr(pipe) == text
    assert type(pipe).__module__ == FluxPipeline.__module__
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline" and not any("diffaccel" in key for key in index)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is FluxPipeline
    assert type(FluxImg2ImgPipeline.from_pipe(pipe)) is FluxImg2ImgPipeline
    assert pipe.to(torch.float32) is pipe


def test_two_pipelines_of_the_same_parts_do_not_interact() -> None:
    first = tiny.make("flux")
    second = FluxPipeline(**first.components)
    second.set_progress_bar_config(disable=True)
    stock = run(second)
    diffaccel.accelerate(first, Heun())
    heun = run(first)
    assert type(second) is FluxPipeline and torch.equal(run(second), stock)
    diffaccel.accelerate(second, Euler())
    assert torch.equal(run(first), heun) and torch.equal(run(second), stock) and not torch.equal(heun, stock)
    diffaccel.remove(first)
    assert torch.equal(run(first), stock)
    assert diffaccel.summary(second).methods[0]["name"] == "euler"


def test_remove_without_methods_changes_nothing() -> None:
    pipe = tiny.make("flux")
    assert diffaccel.remove(pipe) is pipe and type(pipe) is FluxPipeline


def test_summary_tells_the_last_run() -> None:
    pipe = tiny.make("flux")
    assert "no methods active" in str(diffaccel.summary(pipe))
    diffaccel.accelerate(pipe, Heun())
    assert diffaccel.summary(pipe).last_run is None
    run(pipe)
    last = diffaccel.summary(pipe).last_run
    assert last["steps"] == 4 and last["nfe"] == 2 * 7 and last["forwards"] == 2 * last["nfe"]
    assert "heun" in str(diffaccel.summary(pipe)) and "14 NFE" in str(diffaccel.summary(pipe))
    json.dumps(diffaccel.summary(pipe).to_dict())


@pytest.mark.slow
def test_load_opens_folders_and_names_what_it_cannot_find(tmp_path) -> None:
    pipe = tiny.make("flux")
    pipe.save_pretrained(tmp_path / "model")
    loaded = diffaccel.load(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded), run(pipe))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffAccelError, match=r"without model_index\.json"):
        diffaccel.load(tmp_path / "empty")
    with pytest.raises(DiffAccelError, match="Unknown model 'emoji-flx'"):
        diffaccel.load("emoji-flx")


def test_a_second_call_at_another_size() -> None:
    pipe = tiny.make("flux")
    stock = [pipe(**tiny.call_kwargs("flux", size)).images for size in (32, 64, 32)]
    diffaccel.accelerate(pipe, "euler")
    wrapped = [pipe(**tiny.call_kwargs("flux", size)).images for size in (32, 64, 32)]
    assert all(torch.equal(a, b) for a, b in zip(stock, wrapped, strict=True))

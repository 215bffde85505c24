"""A call that is interrupted at any line leaves the pipeline as it was, for the next call and after ``remove``."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch

import diffaccel
from diffaccel import active, compose, presets
from diffaccel.config import Config
from diffaccel.errors import DiffAccelError
from diffaccel.families.generic import stand_ins, watching
from diffaccel.modules import call_class, guard
from diffaccel.runs import profile
from diffaccel.runtime import call as runtime_call
from diffaccel.runtime import interception, probe, stock_loop
from diffaccel.samplers import DPMpp2M, Euler
from tests.support.interrupts import Interrupted, interrupt, visits
from tests.support.small_pipelines import Drifting, Small, draw, make, seeded

NATIVE = [compose, call_class, guard, runtime_call, probe, interception, stand_ins, watching, contextlib]
STOCK = [compose, call_class, guard, runtime_call, stand_ins, watching, stock_loop, contextlib]


def profiled(pipe: Any) -> torch.Tensor:
    def measure() -> torch.Tensor:
        with profile.measure(pipe):
            return draw(pipe)

    return guard.alone(pipe, measure)


CASES = pytest.mark.parametrize(
    ("cls", "modules", "call"),
    [(Small, NATIVE, draw), (Drifting, STOCK, draw), (Small, [profile, guard], profiled)],
    ids=["native", "stock_loop", "profile"],
)


def check_lines(cls: type[Small], modules: list, call: Callable[[Any], torch.Tensor], every: int) -> None:
    """Interrupt ``call`` at every so many lines of ``modules``, and call the pipeline again each time."""
    stock = draw(make(cls))
    pipe = diffaccel.accelerate(make(cls), Euler())
    wrapped = draw(pipe)
    kept_alive = []  # with their frames
    lines = visits(modules, lambda: call(pipe))
    assert len(lines) > 40
    for line in lines[::every]:
        kept_alive.append(interrupt(modules, line, lambda: call(pipe)))
        assert isinstance(kept_alive[-1], Interrupted), line
        assert torch.equal(draw(pipe), wrapped), line
        assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks, line
        kept_alive.append(interrupt(modules, line, lambda: call(pipe)))
        diffaccel.remove(pipe)
        assert type(pipe) is cls and torch.equal(draw(pipe), stock), line
        diffaccel.accelerate(pipe, Euler())


@CASES
def test_an_interrupt_leaves_nothing(cls: Any, modules: list, call: Any) -> None:
    check_lines(cls, modules, call, every=53)


@pytest.mark.slow
@CASES
def test_an_interrupt_at_any_line_leaves_nothing(cls: Any, modules: list, call: Any) -> None:
    check_lines(cls, modules, call, every=1)


@dataclass(frozen=True, kw_only=True)
class Negate(Config):
    """A block method."""

    name: ClassVar[str] = "negate"
    touches: ClassVar[Any] = "blocks"

    def apply(self, pipe: Any) -> Any:
        return pipe.unet.register_forward_hook(lambda module, args, out: (-out[0],))


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_accelerate_or_remove_leaves_all_or_nothing() -> None:
    modules = [compose, call_class, guard, contextlib]
    pipe, stock, kept_alive = make(Small), draw(make(Small)), []

    def wrap() -> None:
        diffaccel.accelerate(pipe, Negate(), Euler())

    def unwrap() -> None:
        diffaccel.remove(pipe)

    def restored() -> bool:
        return type(pipe) is Small and not pipe.unet._forward_hooks and torch.equal(draw(pipe), stock)

    wrapping, unwrapping = visits(modules, wrap), visits(modules, unwrap)
    assert len(wrapping) > 40 and len(unwrapping) > 15 and restored()
    for line in wrapping:
        kept_alive.append(interrupt(modules, line, wrap))
        assert isinstance(kept_alive[-1], Interrupted), line
        methods = [method["name"] for method in diffaccel.summary(pipe).methods]
        assert methods == ["negate", "euler"] or (methods == [] and restored()), line
        diffaccel.remove(pipe)
        assert restored(), line
    for line in unwrapping:
        wrap()
        kept_alive.append(interrupt(modules, line, unwrap))
        assert isinstance(kept_alive[-1], Interrupted), line
        draw(pipe)
        diffaccel.remove(pipe)
        assert restored(), line


@dataclass(frozen=True, kw_only=True)
class Shade(Config):
    """Another one, with an option."""

    name: ClassVar[str] = "shade"
    touches: ClassVar[Any] = "blocks"
    amount: float = 2.0

    def apply(self, pipe: Any) -> Any:
        return pipe.unet.register_forward_hook(lambda module, args, out: (out[0] * self.amount,))


@dataclass(frozen=True, kw_only=True)
class Graphs(Config):
    """One that stands over the others."""

    name: ClassVar[str] = "graphs"
    touches: ClassVar[Any] = "graphs"

    def apply(self, pipe: Any) -> Any:
        return pipe.unet.register_forward_hook(lambda module, args, out: (out[0] + 0.1,))


POINTS = {"fast": (Shade(), Negate(), DPMpp2M()), "balanced": (Shade(amount=0.5), Euler()), "baseline": ()}


def with_quality(name: str) -> Any:
    """Return a pipeline at a point of a preset, with graphs over its methods."""
    pipe = make(Small)
    points = {point: presets.PresetPoint(point, methods) for point, methods in POINTS.items()}
    diffaccel.accelerate(pipe, presets.Preset("preset.json", points, "fast", presets.architecture(pipe)), Graphs())
    return diffaccel.set_quality(pipe, name)


def check_switches(every: int) -> None:
    """Interrupt switches at every so many lines: the pipeline is at the one point or the other, with all methods."""
    modules, stock, kept_alive = [compose, active, guard, contextlib], draw(make(Small)), []
    expected = {name: draw(with_quality(name)) for name in POINTS}
    for before, after in (("fast", "balanced"), ("balanced", "baseline"), ("baseline", "fast")):
        pipe = with_quality(before)
        lines = visits(modules, lambda p=pipe, name=after: diffaccel.set_quality(p, name))
        assert len(lines) > 40
        for line in lines[::every]:
            pipe = with_quality(before)
            switch = functools.partial(diffaccel.set_quality, pipe, after)
            kept_alive.append(interrupt(modules, line, switch))
            point = compose.active(pipe).point.name
            assert isinstance(kept_alive[-1], Interrupted) and point in (before, after), line
            methods = {method["name"] for method in diffaccel.summary(pipe).methods}
            assert methods == {"graphs", *(config.name for config in POINTS[point])}, line
            assert torch.equal(draw(pipe), expected[point]), line
            diffaccel.remove(pipe)
            assert type(pipe) is Small and torch.equal(draw(pipe), stock), line


def test_an_interrupted_switch_of_quality_leaves_one_point_or_the_other() -> None:
    check_switches(every=37)


@pytest.mark.slow
def test_a_switch_of_quality_interrupted_at_many_lines_leaves_one_point_or_the_other() -> None:
    check_switches(every=4)


@pytest.mark.slow
def test_fifty_calls_of_four_threads_are_those_of_one() -> None:
    pipe = tiny.make("sd")

    def picture(seed: int) -> torch.Tensor:
        return pipe(**tiny.call_kwargs("sd", batch=1, steps=2, seed=seed)).images

    stock = picture(0)
    diffaccel.accelerate(pipe, DPMpp2M())
    alone = [picture(seed) for seed in range(200)]
    together: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda first=first: together.update({i: picture(i) for i in range(first, 200, 4)}))
        for first in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert len(together) == 200 and all(torch.equal(together[seed], alone[seed]) for seed in range(200))
    diffaccel.remove(pipe)
    assert torch.equal(picture(0), stock)


@pytest.mark.parametrize("cls", [Small, Drifting])
def test_a_second_caller_can_be_refused(cls: type[Small]) -> None:
    stock = draw(make(cls))
    wanted = draw(diffaccel.accelerate(make(cls), Euler()))
    pipe = diffaccel.accelerate(make(cls), Euler(), on_busy="refuse")
    other = diffaccel.accelerate(cls(make(cls).unet, pipe.scheduler), Euler(), on_busy="refuse")
    entered, leave, drawn = threading.Event(), threading.Event(), []
    forward = pipe.unet.forward

    def held(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        leave.wait(60)
        return forward(*args, **kwargs)

    pipe.unet.forward = held
    first = threading.Thread(target=lambda: drawn.append(draw(pipe)))
    first.start()
    entered.wait(60)
    for busy in (pipe, other):
        with pytest.raises(DiffAccelError, match=r"^The pipeline is busy: .*on_busy='wait'\)\.$"):
            draw(busy)
    leave.set()
    first.join(60)
    assert torch.equal(drawn[0], wanted) and torch.equal(draw(pipe), wanted)
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe), stock)


def test_on_busy_is_kept_and_checked() -> None:
    pipe = diffaccel.accelerate(make(Small), Negate(), on_busy="refuse")
    diffaccel.accelerate(pipe, Euler())
    assert compose.active(pipe).on_busy == "refuse"
    with pytest.raises(DiffAccelError, match="on_busy is 'queue'; it must be 'wait' or 'refuse'"):
        diffaccel.accelerate(pipe, Euler(), on_busy="queue")


@pytest.mark.parametrize("cls", [Small, Drifting])
def test_calls_of_two_threads_wait_for_each_other(cls: type[Small]) -> None:
    pipe = diffaccel.accelerate(make(cls), Euler())
    other = diffaccel.accelerate(cls(pipe.unet, pipe.scheduler), Euler())  # shares the scheduler
    other.set_progress_bar_config(disable=True)
    wanted, drawn = draw(pipe), []
    threads = [
        threading.Thread(target=lambda p=p: drawn.extend(draw(p) for _ in range(5))) for p in (pipe, pipe, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(drawn) == 15 and all(torch.equal(picture, wanted) for picture in drawn)


def test_remove_waits_for_a_call_and_a_call_that_waited_is_then_the_stock_call() -> None:
    pipe = diffaccel.accelerate(make(Small), Euler())
    stock, entered, leave, drawn = draw(make(Small)), threading.Event(), threading.Event(), []

    def hold() -> None:
        entered.set()
        leave.wait(60)

    first = threading.Thread(target=lambda: guard.alone(pipe, hold))
    first.start()
    entered.wait(60)
    others = [threading.Thread(target=diffaccel.remove, args=(pipe,))]
    others.append(
        threading.Thread(target=lambda call=pipe.__call__: drawn.append(call("a cat", generator=seeded())[0]))
    )
    for thread in others:
        thread.start()
    assert diffaccel.summary(pipe).methods and not drawn
    leave.set()
    for thread in (first, *others):
        thread.join(60)
    assert type(pipe) is Small and len(drawn) == 1
    assert torch.equal(draw(pipe), stock)


def test_a_call_within_a_call_passes() -> None:
    pipe = diffaccel.accelerate(make(Small), Euler())
    wanted = draw(pipe)
    assert torch.equal(guard.alone(pipe, lambda: draw(pipe)), wanted)

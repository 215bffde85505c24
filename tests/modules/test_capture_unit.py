"""One module under capture, on the CPU by a stand-in for graphs: what is recorded, what is not, and nothing stale."""

from __future__ import annotations

import copy
import enum
import gc
import inspect
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from diffaccel.modules.capture.arenas import Store
from diffaccel.modules.capture.arguments import Opaque, StaticInput, equal_to_the_bit, key_of, map_result, with_tensors
from diffaccel.modules.capture.graphs import BACKENDS
from diffaccel.modules.capture.interceptor import Interceptor
from diffaccel.modules.capture.unit import FIRST, RECORDED
from diffaccel.modules.network_call import current
from tests.support.replayed_calls import ReplayedCalls, replayed_calls

__all__ = ["replayed_calls"]  # a fixture
pytestmark = pytest.mark.usefixtures("replayed_calls")


class Processor:
    scale = 1.0


class Net(nn.Module):
    """A network that computes what ``inside`` says, with everything that a graph may depend on."""

    def __init__(self, inside: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)
        self.register_buffer("shift", torch.ones(4))
        self.processor = Processor()
        self.processor.scale = 1.0
        self.scaling = {"one": 1.0}
        self.inside = inside
        self.runs = 0

    def forward(self, x: Tensor, scale: float = 1.0, extra: Any = None) -> Any:
        factor = scale * self.processor.scale * self.scaling["one"]
        return self.compute(x, factor, extra)

    def compute(self, x: Tensor, factor: float, extra: Any) -> Any:
        out = self.proj(x) * factor + self.shift
        return out if self.inside is None else self.inside(self, out, extra)


def captured(net: nn.Module, budget: int | None = None) -> Interceptor:
    interceptor = Interceptor.of(net, Store(budget, False))
    interceptor.put_on()
    return interceptor


def account(interceptor: Interceptor) -> Any:
    return interceptor.unit.store.account


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def plain(net: Net, *args: Any, **kwargs: Any) -> Any:
    return type(net).forward(net, *args, **kwargs)


def same(net: Net, *args: Any, times: int = 1, **kwargs: Any) -> bool:
    return all(equal_to_the_bit(net(*args, **kwargs), plain(net, *args, **kwargs)) for _ in range(times))


# -- what is replayed --------------------------------------------------------------------------------------------------


def test_the_first_call_runs_the_second_is_recorded_the_others_are_replayed() -> None:
    net = Net()
    interceptor = captured(net)
    for seed in range(5):
        assert same(net, inputs(seed))
    told = account(interceptor)
    assert (told.replays, told.captures, dict(told.eager)) == (3, 1, {FIRST: 1, RECORDED: 1})
    assert interceptor.unit.store.graphs == 1 and interceptor.unit.store.bytes == 2 * 2 * 4 * 4


def test_results_are_the_callers_to_keep() -> None:
    net = Net()
    captured(net)
    results = [net(inputs(seed)) for seed in range(6)]
    assert all(torch.equal(result, plain(net, inputs(seed))) for seed, result in enumerate(results))
    results[3].zero_()
    assert same(net, inputs(3))


def test_a_kind_is_shapes_strides_dtypes_structure_and_numbers() -> None:
    net = Net()
    interceptor = captured(net)
    wide = inputs(1, 8)
    kinds: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((inputs(),), {}),
        ((inputs(rows=3),), {}),
        ((wide[::2],), {}),
        ((inputs(), 2.0), {}),
        ((inputs(), 2), {}),
        ((inputs(),), {"extra": {"a": None}}),
        ((inputs(),), {"extra": [inputs(2), (inputs(3),)]}),
    ]
    for args, kwargs in kinds:
        assert same(net, *args, times=3, **kwargs)
    assert account(interceptor).captures == len(kinds) == account(interceptor).replays
    assert len(interceptor.unit.store.arenas) == 4  # numbers and None share inputs and memory


def test_settings_of_torch_are_part_of_the_kind() -> None:
    net = Net()
    interceptor = captured(net)
    assert same(net, inputs(), times=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(net, inputs(), times=3) and net(inputs()).dtype != torch.float64
    torch.use_deterministic_algorithms(True)
    try:
        assert same(net, inputs(), times=3)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        assert same(net, inputs(), times=3) and net(inputs()).is_inference()
    assert same(net, inputs()) and account(interceptor).captures == 4


class Pair(NamedTuple):
    first: Tensor
    second: Any


def test_results_of_every_structure() -> None:
    structures = [
        lambda net, out, extra: (out,),
        lambda net, out, extra: [out, (out * 2, None)],
        lambda net, out, extra: UNet2DConditionOutput(sample=out),
        lambda net, out, extra: Pair(out, {"a": out, "b": 3.5}),
        lambda net, out, extra: (out, extra),  # an argument that is passed through
        lambda net, out, extra: out.expand(3, *out.shape),
    ]
    for inside in structures:
        net = Net(inside)
        interceptor = captured(net)
        for seed in range(4):
            result, expected = (
                net(inputs(seed), extra=inputs(seed + 9)),
                plain(net, inputs(seed), extra=inputs(seed + 9)),
            )
            assert type(result) is type(expected) and equal_to_the_bit(result, expected)
        assert account(interceptor).replays == 2


def test_not_a_number_equals_itself_and_minus_zero_is_not_zero() -> None:
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.zeros(2)
    assert equal_to_the_bit(nan, nan.clone()) and not equal_to_the_bit(zero, -zero)
    assert key_of(0.0, []) != key_of(-0.0, []) and key_of(1, []) != key_of(True, []) != key_of(1.0, [])


# -- never stale -------------------------------------------------------------------------------------------------------


def replace_weight(net: Net) -> None:
    net.proj.weight = nn.Parameter(torch.full((4, 4), 2.0))


def move_weight(net: Net) -> None:
    net.proj.weight.data = torch.full((4, 4), 3.0)


def replace_buffer(net: Net) -> None:
    net.shift = torch.full((4,), 7.0)


def replace_module(net: Net) -> None:
    net.proj = nn.Linear(4, 4)


def rescale(net: Net) -> None:
    net.scaling["one"] = 0.5


def rescale_processor(net: Net) -> None:
    net.processor.scale = 0.25


def replace_function(net: Net) -> None:
    net.inside = lambda net, out, extra: out * 3


CHANGES = [
    replace_weight, move_weight, replace_buffer, replace_module, rescale, rescale_processor, replace_function,
    nn.Module.train,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_the_module_is_recorded_again(change: Callable[[Net], Any]) -> None:
    net = Net().eval()
    interceptor = captured(net)
    assert same(net, inputs(), times=3)
    change(net)
    assert same(net, inputs(1), times=3)
    told = account(interceptor)
    assert told.captures == 2 and sum(told.dropped.values()) == 1 and interceptor.unit.store.graphs == 1


def test_a_change_in_place_needs_no_new_graph() -> None:
    net = Net()
    interceptor = captured(net)
    assert same(net, inputs(), times=3)
    net.proj.weight.data.mul_(2)
    assert same(net, inputs(), times=2) and account(interceptor).captures == 1


def test_hooks_around_the_module_run_and_hooks_in_it_keep_it_from_being_recorded() -> None:
    net = Net()
    interceptor = captured(net)
    calls = []
    assert same(net, inputs(), times=3)
    handle = net.register_forward_pre_hook(lambda *_: calls.append("around"))
    assert same(net, inputs(), times=2) and calls == ["around"] * 2 and account(interceptor).captures == 1
    handle.remove()
    inner = net.proj.register_forward_hook(lambda *_: calls.append("in"))
    before = account(interceptor).replays
    net(inputs())
    net(inputs())
    assert calls[2:] == ["in"] * 2 and account(interceptor).replays == before
    assert account(interceptor).eager["a hook is on its proj"] == 2
    inner.remove()
    assert same(net, inputs(), times=2) and account(interceptor).captures == 2


def test_a_module_that_changes_from_call_to_call_is_left_as_it_is() -> None:
    net = Net()
    interceptor = captured(net)
    for number in range(12):
        net.scaling["one"] = 1.0 + number
        assert same(net, inputs(), times=2 if number % 2 else 1)
    assert interceptor.unit._never == "its scaling changes from call to call"
    assert interceptor.unit.store.graphs == 0 and account(interceptor).captures <= 5


def test_a_module_that_moved_away_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    interceptor = captured(net)
    assert same(net, inputs(), times=3) and interceptor.unit.store.bytes > 0
    monkeypatch.delitem(BACKENDS, "cpu")  # as if its weights had been on another device before
    assert same(net, inputs()) and interceptor.unit.store.bytes == 0
    assert account(interceptor).eager["it is on cpu"] == 1


def test_what_a_function_keeps_outside_of_the_module_is_kept_for_its_graph() -> None:
    kept = {"table": torch.full((4,), 2.0)}
    net = Net(lambda net, out, extra: out * kept["table"])
    interceptor = captured(net)
    assert same(net, inputs(), times=2)
    table = weakref.ref(kept.pop("table"))
    assert table() is not None
    interceptor.remove()
    gc.collect()
    assert table() is None


# -- what is not recorded ----------------------------------------------------------------------------------------------


def count(net: Net, out: Tensor, extra: Any) -> Tensor:
    net.runs += 1
    return out * net.runs


def add_in_place(net: Net, out: Tensor, extra: Tensor) -> Tensor:
    extra.add_(1.0)
    return out + extra


def ask_step(net: Net, out: Tensor, extra: Any) -> Tensor:
    return out if current() is None else out * 2


class Strange:
    pass


NOT_RECORDED: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "random": (lambda net, out, extra: out + torch.randn(4), None, "draws random numbers"),
    "dropout": (lambda net, out, extra: nn.functional.dropout(out, 0.5, True), None, "draws random numbers"),
    "item": (lambda net, out, extra: out * out.sum().item(), None, "'_local_scalar_dense' waits for the device"),
    "branch": (lambda net, out, extra: out if out.sum() > 0 else -out, None, "waits for the device"),
    "mask": (lambda net, out, extra: out[out > 0].sum(), None, "waits for the device"),
    "nonzero": (lambda net, out, extra: out.nonzero(), None, "'nonzero' waits for the device"),
    "host state": (count, None, "its runs changes while it runs"),
    "argument in place": (add_in_place, torch.zeros(4), "changes its arguments in place"),
    "step": (ask_step, None, "told the step of the call"),
    "strange argument": (lambda net, out, extra: out, Strange(), "an argument is a Strange"),
    "strange result": (lambda net, out, extra: Strange(), None, "it returns a Strange"),
    "overlap": (lambda net, out, extra: out, torch.zeros(8).as_strided((3, 4), (1, 1)), "overlaps itself in memory"),
}


@pytest.mark.parametrize("case", NOT_RECORDED)
def test_what_cannot_be_in_a_graph_runs_without_one(case: str) -> None:
    inside, extra, reason = NOT_RECORDED[case]
    net, twin = Net(inside), Net(inside)
    twin.load_state_dict(net.state_dict())
    interceptor = captured(net)
    extra_of_twin = copy.deepcopy(extra)
    results = []
    for module, value in ((net, extra), (twin, extra_of_twin)):
        torch.manual_seed(0)
        results.append([module(inputs(seed), extra=value) for seed in range(4)])
    if case != "strange result":
        assert all(map(equal_to_the_bit, *results))
    told = account(interceptor)
    assert told.replays == 0 and interceptor.unit.store.graphs == 0
    assert sum(n for why, n in told.eager.items() if reason in why) >= 3, dict(told.eager)


def test_gradients_modes_and_global_hooks_run_without_a_graph() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    net = Net()
    interceptor = captured(net)
    assert same(net, inputs(), times=3)
    with torch.enable_grad():
        net(inputs()).sum().backward()
    assert net.proj.weight.grad is not None
    with FlopCounterMode(display=False) as counter:
        net(inputs())
    assert counter.get_total_flops() == 2 * 2 * 4 * 4
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        net(inputs())
    finally:
        handle.remove()
    assert calls and account(interceptor).replays == 1 and same(net, inputs())
    assert {"gradients are recorded", "a mode watches the operations", "hooks are on all modules"} <= {
        *account(interceptor).eager
    }


def test_a_recording_that_fails_leaves_a_network_that_works(replayed_calls: type[ReplayedCalls]) -> None:
    net = Net()
    interceptor = captured(net)
    replayed_calls.fails = RuntimeError
    assert same(net, inputs(), times=4)
    assert any("cannot be recorded: RuntimeError" in why for why in account(interceptor).eager)
    replayed_calls.fails = torch.OutOfMemoryError
    assert same(net, inputs(rows=3), times=4)
    assert "out of memory while it was recorded" in account(interceptor).eager
    replayed_calls.fails = KeyboardInterrupt
    net(inputs(rows=5))
    with pytest.raises(KeyboardInterrupt):
        net(inputs(rows=5))
    replayed_calls.fails = None
    assert not interceptor.unit.store.arenas and same(net, inputs(rows=5), times=3)
    assert account(interceptor).replays == 2


def test_a_graph_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    interceptor = captured(net)
    record = ReplayedCalls.record

    def wrong(self: ReplayedCalls, function: Any, pool: Any) -> Any:
        return record(self, lambda: function() + 1e-7, pool)

    monkeypatch.setattr(ReplayedCalls, "record", wrong)
    assert same(net, inputs(), times=4) and account(interceptor).replays == 0
    assert "its graph computes something else than the run without one" in account(interceptor).eager


def test_a_network_without_one_result_is_replayed_with_a_note() -> None:
    noise = iter(torch.linspace(0, 1, 50).unbind())
    net = Net(lambda net, out, extra: out + next(noise))
    interceptor = captured(net)
    for _ in range(4):
        net(inputs())
    assert (
        account(interceptor).replays == 2
        and "two runs of Net without a graph differ" in account(interceptor).notes.pop()
    )


# -- memory ------------------------------------------------------------------------------------------------------------


def test_over_the_budget_the_oldest_memory_is_freed() -> None:
    net = Net()
    of_rows = {rows: 2 * rows * 4 * 4 for rows in (2, 3, 4, 100)}  # inputs and results
    interceptor = captured(net, budget=of_rows[2] + of_rows[4])
    store = interceptor.unit.store
    for rows in (2, 3):
        assert same(net, inputs(rows=rows), times=3)
    assert store.bytes == of_rows[2] + of_rows[3]
    assert same(net, inputs(rows=2)) and same(net, inputs(rows=4), times=3)  # 3 rows were used before 2
    assert store.bytes == of_rows[2] + of_rows[4] and dict(account(interceptor).dropped) == {"over the budget": 1}
    replays = account(interceptor).replays
    assert same(net, inputs(rows=2)) and account(interceptor).replays == replays + 1
    assert same(net, inputs(rows=3), times=2) and store.bytes <= store.budget
    assert same(net, inputs(rows=100), times=4) and store.graphs == 0
    assert any(why.startswith("its graph needs") for why in account(interceptor).eager)


def test_static_inputs_have_strides_and_alignment_of_the_arguments() -> None:
    device = torch.device("cpu")
    storage = torch.arange(400.0)
    for like in (
        storage[1:101],
        storage[:200].view(20, 10).t(),
        storage[:1].expand(70, 2),
        storage[::2],
        torch.tensor(3),
    ):
        static = StaticInput(like, device)
        static.fill(like)
        assert torch.equal(static.tensor, like) and static.tensor.stride() == like.stride()
        if like.numel() > 64 and 0 not in like.stride():
            assert static.tensor.data_ptr() % 16 == like.data_ptr() % 16
    assert StaticInput(storage[:1].expand(70, 2), device).bytes == 4
    assert key_of(storage[1:101], []) != key_of(storage[:100], [])
    assert key_of(storage[1:2], []) == key_of(storage[0:1], [])  # the next timestep of a list
    with pytest.raises(Opaque, match="overlaps"):
        StaticInput(storage.as_strided((5, 5), (1, 1)), device)
    with pytest.raises(Opaque, match="on cpu, and the network on meta"):
        StaticInput(torch.zeros(2000), torch.device("meta"))


class Colour(enum.Enum):
    RED = 1


def test_structures_are_rebuilt() -> None:
    value = {"a": [inputs(), None, Pair(inputs(1), "x")], "b": OrderedDict(c=(1.5, Colour.RED, torch.float16))}
    tensors: list[Tensor] = []
    key = key_of(value, tensors)
    other = with_tensors(value, iter([tensor + 1 for tensor in tensors]))
    assert key_of(other, []) == key and other["a"] is not value["a"] and type(other["a"][2]) is Pair
    assert torch.equal(other["a"][2].first, inputs(1) + 1) and other["b"] == value["b"]
    assert key_of({"a": [inputs()]}, []) != key_of({"a": (inputs(),)}, [])
    with pytest.raises(Opaque, match="Generator"):
        key_of({"generator": torch.Generator()}, [])
    with pytest.raises(Opaque, match="returns a Generator"):
        map_result([torch.Generator()], torch.clone)


# -- on and off --------------------------------------------------------------------------------------------------------


def test_off_again() -> None:
    net = Net()
    before = dict(vars(net))
    interceptor = captured(net)
    assert inspect.signature(net.forward) == inspect.signature(Net().forward)
    assert same(net, inputs(), times=3)
    interceptor.remove()
    interceptor.remove()
    assert vars(net) == before and interceptor.unit.store.graphs == 0 and same(net, inputs())
    net.forward = net.forward  # as other tools leave it
    kept = vars(net)["forward"]
    interceptor = captured(net)
    assert same(net, inputs(), times=3) and account(interceptor).replays == 1
    interceptor.remove()
    assert vars(net)["forward"] == kept


def test_another_tool_may_stand_around_it_and_stays() -> None:
    net = Net()
    interceptor = captured(net)
    inner = net.forward
    net.forward = lambda *args, **kwargs: inner(*args, **kwargs) + 1
    outer = vars(net)["forward"]
    for seed in range(3):
        assert torch.equal(net(inputs(seed)), plain(net, inputs(seed)) + 1)
    assert account(interceptor).replays == 1
    interceptor.remove()
    assert vars(net)["forward"] is outer and torch.equal(net(inputs()), plain(net, inputs()) + 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_records_graphs_of_its_own(duplicate: Callable[[Net], Net]) -> None:
    net = Net()
    interceptor = captured(net)
    assert same(net, inputs(), times=3)
    other = duplicate(net)
    copied = vars(other)["forward"]
    assert copied is not interceptor and copied.unit.module is other and copied.unit.store.graphs == 0
    other.proj.weight.data.mul_(2)
    assert same(other, inputs(), times=3) and same(net, inputs()) and account(copied).replays == 1
    copied.remove()
    assert "forward" not in vars(other) and same(net, inputs())


@pytest.mark.parametrize("way", ["in place", pytest.param("around", marks=pytest.mark.slow), "later"])
def test_compiled_modules(way: str) -> None:
    torch.compiler.reset()
    net = Net()
    module: Any = net
    if way == "in place":
        net.compile(backend="eager", fullgraph=True)
    elif way == "around":
        module = torch.compile(net, backend="eager", fullgraph=True)
    before = dict(vars(module))
    interceptor = captured(module)
    if way == "later":
        net.compile(backend="eager", fullgraph=True)
    for seed in range(4):
        assert torch.equal(module(inputs(seed)), plain(net, inputs(seed)))
    assert account(interceptor).replays == (0 if way == "later" else 2)
    assert interceptor.is_bypassed() == (way == "later")
    interceptor.remove()
    assert torch.equal(module(inputs()), plain(net, inputs()))
    if way != "later":
        assert vars(module) == before

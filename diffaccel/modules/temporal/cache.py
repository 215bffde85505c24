"""The tables of one network: they answer its calls, and know when they no longer hold."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import _C as bindings
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.modules.temporal.arguments import CallArguments, bytes_of
from diffaccel.modules.temporal.generation import Conditions, Generation, Plan, is_waited_for
from diffaccel.modules.temporal.kind import Kind, TooMany
from diffaccel.modules.temporal.places import PLACE, Returning, TemporalPlace, give_back, take
from diffaccel.modules.temporal.program import Program, program_of
from diffaccel.modules.temporal.snapshot import Snapshot
from diffaccel.modules.temporal.trace import CallTrace, watch
from diffaccel.modules.temporal.weights import Weights

MOST_KINDS = 64
MOST_PLANS = 64

Predict = Callable[[Any, Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Options:
    """Options of tables.

    Attributes:
        offloads: whether replaced weights rest on the host.
        trusts: whether timesteps are found on the device alone in calls whose schedule is known.
        keep: sets of conditions that have a table at one time, for each kind of call.
        budget: maximum bytes of one table; None for the bytes of the weights that it stands for, 64 MiB at least.
    """

    offloads: bool = True
    trusts: bool = True
    keep: int = 4
    budget: int | None = None


@dataclass
class TableAccount:
    """What the tables of a network did."""

    modules: int = 0
    parameters: int = 0
    forgotten: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    computed: int = 0
    reads: int = 0


class TemporalCache:
    """Answers the calls of one network with rows of tables in the place of its temporal modules.

    Args:
        predict: returns the timesteps that a pipeline passes to its network in a call, from its schedule; [] where that
            is not known. It is given the pipeline, the latents, and the timestep of the call at hand.
        maker: whose ``features(program, tensors, times, device, fetch)`` takes the place of the program's own, and
            whose ``forget()`` follows a change of weights; None for features to the bit.
    """

    def __init__(self, network: nn.Module, options: Options, predict: Predict, maker: Any = None) -> None:
        self.network, self.options, self.predict, self.maker = network, options, predict, maker
        self._start()

    def _start(self) -> None:
        self.account = TableAccount()
        self.weights, self.conditions = Weights(self.network), Conditions()
        self.generation: Generation | None = None
        self._kinds: dict[Hashable, Kind | str] = {}
        self._bound: dict[Hashable, tuple[str, ...]] = {}
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._places: dict[str, TemporalPlace] = {}
        self._hooks: list[Any] = []
        self._snapshot: Snapshot | None = None
        self._rests = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("network", "options", "predict", "maker")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        self._start()

    # -- on and off ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Take the network's calls."""
        take(self.network, self, is_network=True)

    def remove(self) -> None:
        """Give everything back; may be called twice."""
        self.let_go(True)
        place = vars(self.network).get(PLACE)
        if place is not None and place.owner is self:
            give_back(self.network)

    def let_go(self, forget: bool) -> None:
        """Put all weights back, and forget the tables where ``forget``."""
        self._rests = False
        if self.weights.restore() and self._snapshot is not None:
            self._snapshot.stamp()
        if not forget:
            return
        for place in self._places.values():
            give_back(place.module)
        while self._hooks:
            self._hooks.pop().remove()
        for kind in self._kinds.values():
            self._count(kind)
        self._kinds, self._bound, self._places, self._snapshot = {}, {}, {}, None
        self._plans.clear()
        if self.maker is not None:
            self.maker.forget()  # what it learnt is of the weights as they were

    def _count(self, kind: Kind | str) -> None:
        if isinstance(kind, Kind):
            self.account.computed += kind.computed
            self.account.reads += kind.reads

    def _by_name(self) -> dict[str, nn.Module]:
        return dict(self.network.named_modules())

    # -- calls ---------------------------------------------------------------------------------------------------------

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the network."""
        original: Any = vars(self.network)[PLACE].original

        def plain() -> Any:
            return original.__call__(self.network, *args, **kwargs)

        if (reason := self._watcher()) is not None:
            return self._plain(plain, reason)
        call = CallArguments.of(self.network, args, kwargs)
        self.forget_if_changed()
        key = (call.key, self._bits(call, self._bound.get(call.key, ())))
        kind = self._kinds.get(key)
        if kind is None:
            return self._watch(call, plain)
        if isinstance(kind, str):
            return self._plain(plain, kind)
        try:
            self._fill(kind, call)
        except TooMany as many:
            self._kinds[key] = str(many)
            return self._plain(plain, str(many))
        self._rest()
        return self._with_table(kind, plain)

    def _watcher(self) -> str | None:
        """Return why a call is made without tables; None where nothing is against them.

        Raises:
            DiffAccelError: where the caller captures the network while its weights rest on the host.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            if self.weights.bytes:
                raise DiffAccelError(
                    "'tib' cannot put weights back while a CUDA graph is captured. Capture through "
                    "diffaccel.modules.Capture, or use TIB(weights='device')."
                )
            return "the caller captures it"
        if torch.is_grad_enabled():
            return "gradients are recorded"
        if bindings._len_torch_dispatch_stack():
            return "a mode watches the operations"
        if self.network.training:
            return "it is in train mode"
        return None

    def _plain(self, plain: Callable[[], Any], reason: str) -> Any:
        self.let_go(False)
        self.account.plain[reason] += 1
        return plain()

    def forget_if_changed(self) -> None:
        """Forget the tables where adapters, hooks or weights of temporal modules differ from when they were made."""
        if self._snapshot is None:
            return
        self.weights.check()
        change = self._snapshot.change()
        if change is None and self._is_due():
            change = "weights" if self._snapshot.rewritten(self.weights.numbers) else None
        if change is not None:
            self.account.forgotten[change] += 1
            self.let_go(True)

    def _is_due(self) -> bool:
        """Return whether the bits of the weights are looked at: once in a pipeline call, and in every other call.

        The host waits in these anyway, for new conditions or a timestep.
        """
        if self.generation is None:
            return True
        is_first, self.generation.has_looked = not self.generation.has_looked, True
        return is_first

    def _bits(self, call: CallArguments, places: tuple[str, ...]) -> bytes:
        return self.conditions.digest([call.tensors[place] for place in places])

    @contextlib.contextmanager
    def _results(self, kind: Kind) -> Iterator[None]:
        for name, place in self._places.items():
            place.result = kind.results.get(name)
        try:
            yield
        finally:
            for place in self._places.values():
                place.result = None

    def _with_table(self, kind: Kind, plain: Callable[[], Any]) -> Any:
        self.account.answered += 1
        with self._results(kind):
            return plain()

    # -- the first call of a kind --------------------------------------------------------------------------------------

    def _watch(self, call: CallArguments, plain: Callable[[], Any]) -> Any:
        """Make the first call of its kind as ever, watch what it computes, and make its table."""
        self.let_go(len(self._kinds) >= MOST_KINDS)
        if self._snapshot is not None and self._snapshot.rewritten(self.weights.numbers):
            self.account.forgotten["weights"] += 1
            self.let_go(True)
        trace, result = watch(self.network, call, plain)
        kind = self._kind_of(trace, call)
        places = tuple(sorted(trace.host_reads))
        if places and not isinstance(kind, str):
            self._bound[call.key] = places
        self._kinds[call.key, self._bits(call, self._bound.get(call.key, ()))] = kind
        if isinstance(kind, str):
            self.account.plain[kind] += 1
            return result
        modules = self._by_name()
        for name in kind.results:
            if name not in self._places:
                self._places[name] = take(modules[name], self)
                hook = Returning(self)
                self._hooks += [part.register_state_dict_pre_hook(hook) for part in modules[name].modules()]
        kinds = [kind for kind in self._kinds.values() if isinstance(kind, Kind)]
        self._snapshot = Snapshot(self.network, self._places, [w for kind in kinds for w in kind.program.weights])
        self._snapshot.mark(self.weights.numbers)
        self.account.modules = len(self._places)
        self.account.parameters = sum(p.numel() for name in self._places for p in modules[name].parameters())
        self._fill(kind, call)
        self._rest()
        is_other = _is_compiled(self.network) or self.maker is not None  # than what was watched
        return self._with_table(kind, plain) if is_other else result

    def _kind_of(self, trace: CallTrace, call: CallArguments) -> Kind | str:
        program = program_of(trace, call)
        if isinstance(program, str):
            return program
        device = next(iter(trace.features.values())).device
        time = call.tensors[program.time]
        try:
            kind = Kind(call.key, program, time, device, self.options.keep)
        except TooMany as many:
            return str(many)
        again = program.evaluate(call.tensors, [time], device, self.weights.fetch)[0]
        if not all(_is_equal(again[number], trace.features[number]) for number in program.features):
            return "its temporal features cannot be computed again to the bit"
        size = kind.layout.row_bytes * max(1, len(self._predicted(call, time)))
        if size > self._budget(kind):
            return f"a table of {size / 2**20:.0f} MiB would be larger than its budget (TIB(budget_gib=...))"
        return kind

    def _budget(self, kind: Kind) -> int:
        if self.options.budget is not None:
            return self.options.budget
        return max(64 << 20, sum(w.numel() * w.element_size() for w in kind.program.weights))

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _fill(self, kind: Kind, call: CallArguments) -> None:
        """Bring the row of a call's timestep to the memory that the network reads."""
        program, generation = kind.program, self.generation
        time = call.tensors[program.time]
        block = kind.block(self._bits(call, program.conditions))
        plan = None if generation is None else generation.plan(kind)
        waits = is_waited_for(time)
        if generation is not None and plan is not None and plan.is_complete and waits and self.options.trusts:
            if not plan.times.keys() <= block.index.keys():
                kind.insert(block, call.tensors, list(plan.times.values()), self._evaluate)
            generation.expect(kind.stage_rows(block, time))
            return
        keys = kind.keys_on_host(time)
        if any(key not in block.index for key in keys):
            kind.insert(block, call.tensors, [time, *self._expected(block, call, time, plan)], self._evaluate)
        if plan is not None:
            plan.times |= {key: time.detach().clone() for key in keys if key not in plan.times}
        if kind.layout.units == 1:
            kind.stage.take_row(block, block.index[keys[0]])
        else:
            kind.stage_rows(block, time)

    def _evaluate(
        self, program: Program, tensors: dict[str, Tensor], times: list[Tensor], device: torch.device
    ) -> list[dict[int, Tensor]]:
        evaluate = program.evaluate if self.maker is None else functools.partial(self.maker.features, program)
        return evaluate(tensors, times, device, self.weights.fetch)

    def _expected(self, block: Any, call: CallArguments, time: Tensor, plan: Plan | None) -> list[Tensor]:
        """Return the timesteps to compute with this one: those of the plan, or of the schedule, once for each block."""
        if self.generation is None or id(block) in self.generation.predicted:
            return []
        self.generation.predicted.add(id(block))
        if plan is not None and plan.is_complete:
            return list(plan.times.values())
        return self._predicted(call, time)

    def _predicted(self, call: CallArguments, time: Tensor) -> list[Tensor]:
        sample = call.tensors.get(call.sample)
        if self.generation is None or sample is None:
            return []
        times = self.predict(self.generation.pipe, sample, time)
        return times if any(torch.equal(other, time) for other in times) else []

    def _rest(self) -> None:
        """Let the weights that tables stand for rest on the host."""
        if self.options.offloads and not self._rests and self._snapshot is not None:
            self._rests = True
            kinds = [kind for kind in self._kinds.values() if isinstance(kind, Kind)]
            self.weights.offload(set.intersection(*(set(kind.results) for kind in kinds)))
            self._snapshot.stamp()

    # -- pipeline calls ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def during(self, pipe: Any, label: Hashable) -> Iterator[None]:
        """Know that the network calls of this block are those of one pipeline call."""
        before, self.generation = self.generation, Generation(pipe, label, self._plans)
        try:
            yield
            self.generation.end()
        finally:
            self.generation = before
            while len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)

    def report(self) -> dict[str, Any]:
        """Return what the tables hold and did; JSON-ready."""
        kinds = [kind for kind in self._kinds.values() if isinstance(kind, Kind)]
        account = self.account
        return {
            "network": type(self.network).__name__,
            "modules": account.modules,
            "parameters": account.parameters,
            "host_bytes": self.weights.bytes,
            "table_bytes": sum(kind.memory for kind in kinds),
            "rows": sum(len(block.index) for kind in kinds for block in kind.blocks.values()),
            "computed": account.computed + sum(kind.computed for kind in kinds),
            "answered": account.answered,
            "waited": account.reads + sum(kind.reads for kind in kinds) + self.conditions.reads,
            "forgotten": dict(account.forgotten),
            "plain": dict(account.plain),
            **({} if self.maker is None else {"quantized": self.maker.report()}),
        }


def _is_compiled(network: nn.Module) -> bool:
    return vars(network).get("_compiled_call_impl") is not None


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bytes_of(a), bytes_of(b))

"""One module under capture: the network, or one of its blocks where a step cache decides between them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import first_line
from diffaccel.modules.capture import state
from diffaccel.modules.capture.arenas import Arena, Recorded, Store
from diffaccel.modules.capture.arguments import (
    Opaque,
    copied,
    equal_to_the_bit,
    key_of,
    map_result,
    tensor_key,
    with_tensors,
)
from diffaccel.modules.capture.graphs import BACKENDS, Rehearsal, Waiting
from diffaccel.modules.capture.settings import benchmarking, settings, watcher, without_casts_kept
from diffaccel.modules.network_call import noting_reads
from diffaccel.modules.stand_in import random_states

FIRST = "the first call of its kind"
RECORDED = "a graph was recorded"
MOST_WASTED = 3  # recordings in a row that were replayed less than twice
MOST_KINDS = 512  # of calls that are remembered

logger = logging.getLogger(__name__)
_NUMBERS = itertools.count()

PlainCall = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module: the function that answers it without a graph, and its arguments."""

    plain: PlainCall
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """Return what the module returns."""
        return self.plain(*self.args, **self.kwargs)

    def on(self, tensors: list[Tensor]) -> ModuleCall:
        """Return the same call on other tensors, in containers of its own: a run may take things out of a list."""
        args, kwargs = with_tensors((self.args, self.kwargs), iter(tensors))
        return ModuleCall(self.plain, args, kwargs)


class Unit:
    """Answers the calls of a module by graphs.

    The first call of a kind runs as ever. The second does too, is recorded as a graph, and the graph's first replay is
    compared with it to the bit. From the third on the graph is replayed: inputs are copied in, and the result is copied
    out, which is the caller's to keep. What cannot be recorded runs as ever, with its reason in the account.

    Args:
        hooks_inside: whether hooks of the module itself run inside of the calls, as compiled ones do.
    """

    def __init__(self, module: nn.Module, store: Store, hooks_inside: bool = False) -> None:
        self.module, self.store, self.hooks_inside = module, store, hooks_inside
        self.name = type(getattr(module, "_orig_mod", module)).__name__
        self._start()

    def _start(self) -> None:
        self._number = next(_NUMBERS)  # names it among the graphs
        self._state: state.ModuleState | None = None
        self._kinds: dict[Hashable, None] = {}
        self._refused: dict[Hashable, str] = {}
        self._arenas: dict[Hashable, weakref.ref[Arena]] = {}  # of the graphs, by their keys
        self._weight: Tensor | None = None  # the first one
        self._never: str | None = None
        self._replays, self._wasted, self._own_changes = 0, 0, 0
        self.is_on = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("module", "store", "hooks_inside", "name")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        self._start()

    def answer(self, call: ModuleCall) -> Any:
        """Return the result of a call, by a graph where there is one."""
        if not self.is_on:
            return call.run()
        if self._weight is None:
            self._weight = state.first_weight(self.module)
        tensors: list[Tensor] = []
        reason = _no_backend(self._weight)
        if reason is not None and self._arenas:
            self.forget(reason)  # moved away: its memory is wanted back
        reason = self._never or reason or watcher()
        if reason is None:
            try:
                key: Hashable = (key_of((call.args, call.kwargs), tensors), settings())
            except Opaque as opaque:
                reason = str(opaque)
        if reason is not None:
            return self._run(call, reason)
        with self.store.lock:
            return self._answer(call, key, tensors)

    def _answer(self, call: ModuleCall, key: Hashable, tensors: list[Tensor]) -> Any:
        self._forget_if_changed()
        if (reason := self._never or self._refused.get(key)) is not None:
            return self._run(call, reason)
        place = self._arenas.get(key)
        arena = None if place is None else place()
        recorded = None if arena is None else arena.graphs.get((self._number, key))
        if arena is not None and recorded is not None:
            self.store.touch(arena)
            self.store.account.replays += 1
            self._replays += 1
            return arena.replay(recorded, tensors)
        if key not in self._kinds:
            self._kinds[key] = None
            if len(self._kinds) > MOST_KINDS:
                self._kinds.pop(next(iter(self._kinds)))
            return self._run(call, FIRST)
        return self._run_and_record(call, key, tensors)

    def _run(self, call: ModuleCall, reason: str) -> Any:
        """Run a call without a graph, and note why."""
        self.store.account.eager[reason] += 1
        with benchmarking(self.store.benchmarks):
            return call.run()

    # -- what has changed ----------------------------------------------------------------------------------------------

    def _forget_if_changed(self) -> None:
        """Give up all graphs where anything of the module differs from when they were recorded."""
        if self._state is None or self._state.holds():
            return
        change = self._state.change()
        if self._arenas:
            self._wasted = self._wasted + 1 if self._replays < 2 else 0
        self.forget(f"{change} changed")
        if self._wasted >= MOST_WASTED:
            self._never = f"its {change} changes from call to call"
            self._warn(self._never)

    def _note_own_change(self) -> str:
        """Return what a run has changed of its own module, which is left as it is where that happens again.

        A scale that is multiplied and divided again in every run may settle after the first.
        """
        change = "state" if self._state is None else self._state.change()
        reason = f"its {change} changes while it runs"
        self.forget(reason)
        self._own_changes += 1
        if self._own_changes > 1:
            self._never = reason
        return reason

    def forget(self, reason: str) -> None:
        """Give up all graphs of this module."""
        self.store.drop(self._number, reason)
        self._state, self._weight, self._refused, self._arenas, self._replays = None, None, {}, {}, 0

    def _warn(self, reason: str) -> None:
        """Log, once for a class of modules, why some of its calls run without a graph."""
        if (self.name, reason) not in self.store.account.warned:
            self.store.account.warned.add((self.name, reason))
            logger.warning("'capture' runs calls of %s without a graph: %s.", self.name, reason)

    # -- recording -----------------------------------------------------------------------------------------------------

    def _run_and_record(self, call: ModuleCall, key: Hashable, tensors: list[Tensor]) -> Any:
        """Run a call as ever, and record its graph; return the result of the run."""
        state.check(self.module)
        again = call.on(tensors)
        if self._state is None:
            self._state = state.ModuleState(self.module, self.hooks_inside)
        weight: Any = state.first_weight(self.module)  # without one there is no backend
        before = random_states(weight.device)
        with noting_reads() as reads:
            result = self._run(call, RECORDED)
        if not all(map(torch.equal, before, random_states(weight.device))):
            reason: str | None = "it draws random numbers"
        elif reads:
            reason = "a method in it is told the step of the call"
        elif not self._state.holds():
            reason = self._note_own_change()
        else:
            reason = state.hook_inside(self.module, self.hooks_inside)
            reason = reason or self._record(again, key, tensors, result, weight.device)
        if reason is not None:
            self.store.account.eager[RECORDED] -= 1
            self.store.account.eager[reason] += 1
            self._warn(reason)
            if self._state is not None:
                self._refused[key] = reason
        return result

    def _record(
        self, call: ModuleCall, key: Hashable, tensors: list[Tensor], result: Any, device: torch.device
    ) -> str | None:
        """Record the graph of a call that gave ``result``; return why that cannot be, or None."""
        try:
            map_result(result, lambda tensor: tensor)
            arena = self.store.arena((device, *map(tensor_key, tensors)), tensors, device)
        except Opaque as opaque:
            return str(opaque)
        self.store.touch(arena)
        try:
            arena.fill(tensors)
            recorded = self._recorded(call, arena, device)
            arena.graphs[self._number, key] = recorded
            self._check_replay(call, arena, recorded, tensors, result)
        except BaseException as error:  # also an interrupt
            arena.graphs.pop((self._number, key), None)
            if not arena.graphs or not isinstance(error, Opaque | Waiting):  # a pool in which a recording failed
                self.store.free(arena, "a recording failed")
            if not isinstance(error, Exception):
                raise
            return _reason(error)
        self.store.account.captures += 1
        reason = self.store.fit(arena)
        if reason is None:
            self._arenas[key] = weakref.ref(arena)
        return reason

    def _recorded(self, call: ModuleCall, arena: Arena, device: torch.device) -> Recorded:
        """Return the graph of a call on the arena's inputs.

        Raises:
            Opaque: the call changes its arguments.
            Waiting: the host waits for the device in it.
        """
        inputs = [static.tensor for static in arena.inputs]

        def run() -> Any:
            with without_casts_kept(), benchmarking(self.store.benchmarks):
                return call.on(inputs).run()

        versions = [tensor._version for tensor in inputs]
        rehearsal = None if state.is_compiled(self.module) else Rehearsal(device)
        with rehearsal or contextlib.nullcontext():
            arena.backend.warm_up(run)
        if versions != [tensor._version for tensor in inputs]:
            raise Opaque("it changes its arguments in place")
        graph, result = arena.backend.record(run, arena.pool)
        return Recorded(graph, result, [] if rehearsal is None else rehearsal.read)

    def _check_replay(
        self, call: ModuleCall, arena: Arena, recorded: Recorded, tensors: list[Tensor], result: Any
    ) -> None:
        """Compare the first replay with the run without a graph.

        Where two runs without one differ themselves, as kernels with atomic sums do, there is nothing to compare.

        Raises:
            Opaque: the graph computes something else.
        """
        if equal_to_the_bit(arena.replay(recorded, tensors), result):
            return
        kept = map_result(result, copied)
        with benchmarking(self.store.benchmarks):
            again = call.on(tensors).run()
        if equal_to_the_bit(again, kept):
            raise Opaque("its graph computes something else than the run without one")
        self.store.account.notes.add(f"two runs of {self.name} without a graph differ; a replay is like one of them")


def _no_backend(weight: Tensor | None) -> str | None:
    if weight is None:
        return "it has no weights"
    return None if weight.device.type in BACKENDS else f"it is on {weight.device}"


def _reason(error: Exception) -> str:
    if isinstance(error, Opaque | Waiting):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory while it was recorded"
    return f"it cannot be recorded: {type(error).__name__}: {first_line(error)}"

"""The operations that compute a network's temporal features, run again at other timesteps.

A *temporal module* is one whose every call, in a watched network call, returned values that depend on the timestep and
on no sample. Those that lie in no other are replaced; what they return are the features of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.modules.temporal.arguments import CallArguments
from diffaccel.modules.temporal.trace import UNKNOWN, CallTrace, Operation, Ref, Shape

MOST_BYTES = 16 << 20  # that one module may return, unless its rows are those of a timestep per token
FEW = 64  # timesteps of a call: more are one per token

Fetch = Callable[[Tensor, torch.device], Tensor]
Revise = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Program:
    """Operations from the arguments of a call to its temporal features.

    Attributes:
        operations: in order, none without use.
        sources: arguments by their place, and weights, by the number of the value.
        features: numbers of the values that are features, in order.
        time: place of the timestep among the arguments.
        conditions: places of the other arguments that are read.
        modules: by name of each replaced module: its result with features as :class:`Ref`.
        varying: numbers of the values that depend on the timestep.
        shapes: of the features, by number.
        last_use: position of the last operation that reads a value, by its number.
    """

    operations: tuple[Operation, ...]
    sources: dict[int, str | Tensor]
    features: tuple[int, ...]
    time: str
    conditions: tuple[str, ...]
    modules: dict[str, Any]
    varying: frozenset[int]
    shapes: dict[int, Shape]
    last_use: dict[int, int]

    @property
    def weights(self) -> list[Tensor]:
        """The weights that the operations read."""
        return [source for source in self.sources.values() if isinstance(source, Tensor)]

    def evaluate(
        self, tensors: dict[str, Tensor], times: Sequence[Tensor], device: torch.device, fetch: Fetch,
        revise: Revise | None = None,
    ) -> list[dict[int, Tensor]]:  # fmt: skip
        """Return the features at each timestep, by number; each weight is fetched once for all of them.

        Args:
            tensors: the arguments of the call, by place; the timestep is taken from ``times``.
            fetch: returns the weight on the device of the network.
            revise: returns what takes the place of a value, by its number, after the operation that gave it.
        """
        shared: dict[int, Tensor] = {}
        own: list[dict[int, Tensor]] = [{} for _ in times]
        for number, source in self.sources.items():
            if isinstance(source, str):
                for values, time in zip(own, times, strict=True):
                    values[number] = time if source == self.time else tensors[source]
                shared[number] = tensors[source]
        for position, operation in enumerate(self.operations):
            for number in operation.inputs:
                weight = self.sources.get(number)
                if isinstance(weight, Tensor) and number not in shared:
                    shared[number] = fetch(weight, device)
            is_varying = operation.results[0] in self.varying
            for values in own if is_varying else [shared]:
                _run(operation, values, shared)
                if revise is not None:
                    values |= {number: revise(number, values[number]) for number in operation.results}
            for number in (*operation.inputs, *operation.results):
                if self.last_use.get(number, position) == position:
                    for values in (shared, *own):
                        values.pop(number, None)
        return [{number: values.get(number, shared.get(number)) for number in self.features} for values in own]  # type: ignore[misc]


def _run(operation: Operation, values: dict[int, Tensor], shared: dict[int, Tensor]) -> None:
    def value(item: Any) -> Any:
        if isinstance(item, Ref):
            return values[item.number] if item.number in values else shared[item.number]
        if isinstance(item, list | tuple):
            return type(item)(value(part) for part in item)
        return item

    kwargs = {name: value(item) for name, item in operation.kwargs.items()}
    result = operation.function(*(value(item) for item in operation.args), **kwargs)
    results = list(result) if isinstance(result, list | tuple) else [result]
    tensors = [item for item in results if isinstance(item, Tensor)]
    values.update(zip(operation.results, tensors, strict=True))


def program_of(trace: CallTrace, call: CallArguments) -> Program | str:
    """Return the program of a watched call, or why there is none."""
    time = call.time
    if time is None:
        return "its timestep is no tensor"
    if time in trace.host_reads:
        return "it reads its timestep on the host"
    tokens = frozenset(place for place, tensor in call.tensors.items() if tensor.ndim > 2)
    is_per_token = call.tensors[time].numel() > FEW and call.tensors[time].ndim > 1
    modules = _temporal_modules(trace, time, 0 if is_per_token else MOST_BYTES, tokens)
    if not modules:
        return "nothing in it depends on the timestep alone"
    return operations_for(
        trace, time, [number for result in modules.values() for number in numbers_in(result)], modules
    )


def operations_for(trace: CallTrace, time: str, numbers: Sequence[int], modules: dict[str, Any]) -> Program:
    """Return the program of some values of a watched call.

    Args:
        modules: what the modules return that it stands for, by name.
    """
    features = tuple(dict.fromkeys(numbers))
    needed, operations = set(features), list[Operation]()
    for operation in reversed(trace.operations):
        if needed.intersection(operation.results):
            operations.append(operation)
            needed.update(operation.inputs)
    operations.reverse()
    sources = {number: source for number, source in trace.sources.items() if number in needed}
    places = {place for number in features for place in trace.reads[number]} | set(trace.host_reads)
    last_use = {number: i for i, operation in enumerate(operations) for number in operation.inputs}
    last_use |= dict.fromkeys(features, len(operations))
    varying = frozenset(n for operation in operations for n in operation.results if time in trace.reads[n])
    shapes = {number: trace.shapes[number] for number in features}
    conditions = tuple(sorted(places - {time}))
    return Program(tuple(operations), sources, features, time, conditions, modules, varying, shapes, last_use)


def numbers_in(result: Any) -> list[int]:
    """Return the numbers of all values in a module's result."""
    if isinstance(result, Ref):
        return [result.number]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ()
    return [number for item in items for number in numbers_in(item)]


def _temporal_modules(trace: CallTrace, time: str, most_bytes: int, tokens: frozenset[str]) -> dict[str, Any]:
    """Return the outermost temporal modules, with what they return.

    Args:
        most_bytes: that one module may return; 0 for any number.
        tokens: places of arguments with tokens, such as encoded text. What has tokens because of them is no feature.
    """
    temporal: dict[str, Any] = {}
    for name, calls in trace.calls.items():
        inside = any(name.startswith(outer + ".") for outer in temporal)
        if not name or not calls.results or inside or any(repr(r) != repr(calls.results[0]) for r in calls.results):
            continue
        numbers = set(numbers_in(calls.results[0]))
        if not numbers or not all(_is_feature(trace, number, time, tokens) for number in numbers):
            continue
        if not most_bytes or sum(trace.shapes[number].bytes for number in numbers) <= most_bytes:
            temporal[name] = calls.results[0]
    return temporal


def _is_feature(trace: CallTrace, number: int, time: str, tokens: frozenset[str]) -> bool:
    if number == UNKNOWN.number or time not in trace.reads[number]:
        return False
    return len(trace.shapes[number].size) <= 2 or not tokens.intersection(trace.reads[number])

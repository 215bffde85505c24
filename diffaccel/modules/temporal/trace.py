"""One network call watched operation by operation: what depends on the sample, and what on timestep and conditions.

Every tensor that is computed from weights, constants and arguments other than the sample is a *value* with a number;
the same operation on the same values has the same number. What reads the sample, draws random numbers or is not known
has none. The operations of values are kept, so that a value can be computed again at another timestep: the same
kernels on the same shapes, equal to the bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from diffaccel.modules.temporal.arguments import CallArguments, map_tensors, tensors_in

MOST_LISTED = 4096  # elements of a constant that the network writes out, as ``torch.tensor([...])``
HOST_READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item", "aten::nonzero")


@dataclass(frozen=True)
class Ref:
    """Stands for a value in the arguments of a kept operation."""

    number: int


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation on values: ``function(*args, **kwargs)`` gives the values ``results``."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the function without its overload, such as ``"aten::addmm"``."""
        return str(_schema(self.function).name)


@dataclass(frozen=True)
class Shape:
    """Shape, strides and dtype of a value."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.size) * self.dtype.itemsize


UNKNOWN = Ref(-1)  # a tensor that is no value


@dataclass
class ModuleCalls:
    """What the calls of one module returned, with every tensor as :class:`Ref`; None for what is no container.

    Attributes:
        inputs: for each call the number of its first argument, where that is a value.
    """

    results: list[Any] = field(default_factory=list)
    inputs: list[int | None] = field(default_factory=list)


class CallTrace(TorchDispatchMode):
    """Watches the operations of a network call.

    Attributes:
        reads: by number of the value: the places of the arguments that it depends on.
        shapes: by number of the value.
        sources: places of arguments, and the weights, that are values by themselves; by number.
        operations: in the order in which they ran.
        host_reads: places of arguments that decided something on the host.
        calls: of every module, by its name.
        features: tensors that modules returned and that are values, by number.
    """

    def __init__(self, network: nn.Module, call: CallArguments) -> None:
        super().__init__()
        self.reads: list[frozenset[str]] = []
        self.shapes: list[Shape] = []
        self.sources: dict[int, str | Tensor] = {}
        self.operations: list[Operation] = []
        self.host_reads: frozenset[str] = frozenset()
        self.calls: dict[str, ModuleCalls] = {}
        self.features: dict[int, Tensor] = {}
        self._numbers: Any = WeakTensorKeyDictionary()
        self._known: dict[Hashable, tuple[int, ...]] = {}
        self._weights: Any = WeakIdKeyDictionary()
        attributes = (value for part in network.modules() for value in vars(part).values() if isinstance(value, Tensor))
        for tensor in (*network.parameters(), *network.buffers(), *attributes):
            self._weights[tensor] = None
        self._constants: dict[int, int] = {}
        for place, tensor in call.tensors.items():
            if place != call.sample and not place.startswith(call.sample + "."):
                self._numbers[tensor] = self._new(tensor, frozenset((place,)), place)

    def _new(self, tensor: Tensor, reads: frozenset[str], source: str | Tensor | None = None) -> int:
        self.reads.append(reads)
        self.shapes.append(Shape(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype))
        number = len(self.reads) - 1
        if source is not None:
            self.sources[number] = source
        return number

    def number_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor that is a value, or None."""
        if tensor in self._weights:
            if id(tensor) not in self._constants:
                self._constants[id(tensor)] = self._new(tensor, frozenset(), tensor)
            constant = self._constants[id(tensor)]
            return constant if self.shapes[constant].dtype == tensor.dtype else None  # it is cast during the call
        number: int | None = self._numbers.get(tensor)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default and args[0].numel() <= MOST_LISTED:
            self._numbers[args[0]] = self._new(args[0], frozenset(), args[0].clone())  # a constant that is written out
        inputs = [self.number_of(tensor) for tensor in tensors_in((args, kwargs))]
        result = func(*args, **kwargs)
        name = _schema(func).name
        numbers = [number for number in inputs if number is not None]
        if name in HOST_READS or func is torch.ops.aten._local_scalar_dense.default:
            if len(numbers) == len(inputs):
                self.host_reads = self.host_reads.union(*(self.reads[n] for n in numbers))
        elif _schema(func).is_mutable:
            self._forget(_written(func, args, kwargs))
        elif len(numbers) == len(inputs) and not _is_unknown(func):
            self._keep(func, args, kwargs, tuple(numbers), result)
        return result

    def _keep(self, func: Any, args: Any, kwargs: Any, inputs: tuple[int, ...], result: Any) -> None:
        """Keep an operation on values, unless it has been kept already."""
        tensors = list(tensors_in(result))
        numbered = map_tensors((tuple(args), kwargs), lambda tensor: Ref(self.number_of(tensor) or 0))
        key = (func, repr(numbered))
        if key not in self._known:
            reads = frozenset().union(*(self.reads[n] for n in inputs))
            results = tuple(self._new(tensor, reads) for tensor in tensors)
            self._known[key] = results
            self.operations.append(Operation(func, numbered[0], numbered[1], inputs, results))
        for tensor, number in zip(tensors, self._known[key], strict=True):
            if self.number_of(tensor) is None:  # some return what they were given
                self._numbers[tensor] = number

    def _forget(self, tensors: list[Tensor]) -> None:
        """Forget the values whose memory an operation wrote to."""
        written = {_memory(tensor) for tensor in tensors} - {None}
        for table in (self._numbers, self._weights):
            for tensor in [tensor for tensor in table if _memory(tensor) in written]:
                del table[tensor]

    @contextlib.contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Watch the operations of this block, and the results of the network's modules."""
        hooks = []
        try:
            for name, module in network.named_modules():
                calls = self.calls[name] = ModuleCalls()
                if "forward" in vars(module):  # somebody's own, which no row stands for
                    continue
                noting = self._noting(calls)  # first of the hooks: a row stands for what the forward returns
                hooks.append(module.register_forward_hook(noting, prepend=True, with_kwargs=True))
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _noting(self, calls: ModuleCalls) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            calls.inputs.append(self.number_of(first) if isinstance(first, Tensor) else None)
            calls.results.append(map_tensors(result, self._ref) if _is_container(result) else None)

        return note

    def _ref(self, tensor: Tensor) -> Ref:
        number = self.number_of(tensor)
        if number is None:
            return UNKNOWN
        self.features.setdefault(number, tensor)
        return Ref(number)


def _schema(func: Any) -> Any:
    """Return the schema of an operation: its name, and which arguments it writes to."""
    return func._schema


def _is_container(result: Any) -> bool:
    """Return whether a result consists of tensors, lists, tuples and dicts alone; a model's output class does not."""
    if isinstance(result, list | tuple):
        return all(map(_is_container, result))
    if type(result) is dict:
        return all(map(_is_container, result.values()))
    return isinstance(result, Tensor | bool | int | float | str | type(None))


def _is_unknown(func: Any) -> bool:
    """Return whether the result of an operation is not determined by its inputs: random numbers, empty memory."""
    name = _schema(func).name.partition("::")[2]
    return torch.Tag.nondeterministic_seeded in func.tags or name.startswith(("empty", "new_empty"))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation in place changes."""
    written = []
    for position, argument in enumerate(_schema(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += list(tensors_in(value))
    return written


def _memory(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # a wrapper of other tensors
        return None


def watch(network: nn.Module, call: CallArguments, plain: Callable[[], Any]) -> tuple[CallTrace, Any]:
    """Make a network call without compiled code, and return its trace and its result."""
    trace = CallTrace(network, call)
    with torch.compiler.set_stance("force_eager"), trace.watching(network):
        return trace, plain()

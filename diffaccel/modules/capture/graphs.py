"""Recording of what a function launches: a backend for each kind of device, in a plain dict.

A backend records a function that takes nothing and returns the result of a network call at fixed addresses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import _C as bindings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Graph(Protocol):
    """What a function launched, recorded.

    Attributes:
        bytes: device memory that it added to its pool.
    """

    bytes: int

    def replay(self) -> None:
        """Launch it again on the current stream; the host does not wait."""


class GraphBackend(Protocol):
    """Records graphs on one device."""

    def new_pool(self) -> Any:
        """Return a handle of memory that several graphs may share, which are replayed one after another."""

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run a function as it will be recorded: beside the caller's own stream."""

    def record(self, function: Callable[[], Any], pool: Any) -> tuple[Graph, Any]:
        """Return the graph of a function, and the result that a replay fills in.

        Nothing is left of a recording that fails.
        """

    def stream(self) -> Any:
        """Return the current stream."""

    def wait(self, stream: Any) -> None:
        """Let the current stream wait for another one, without the host."""

    def memory(self) -> int:
        """Return the bytes of memory that the device has."""


class CudaGraph:
    """A recorded :class:`torch.cuda.CUDAGraph` and the memory that it added to its pool."""

    def __init__(self) -> None:
        self.graph, self.bytes = torch.cuda.CUDAGraph(), 0

    def replay(self) -> None:
        self.graph.replay()


class CudaGraphs:
    """CUDA graphs on one device, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: Any = None

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def wait(self, stream: Any) -> None:
        self.stream().wait_stream(stream)

    def memory(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def warm_up(self, function: Callable[[], Any]) -> None:
        side, current = self._side_stream(), self.stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function()
        current.wait_stream(side)

    def record(self, function: Callable[[], Any], pool: Any) -> tuple[Graph, Any]:
        with _RECORDING, torch.cuda.device(self.device):
            stream = self.stream()
            try:
                bindings._cuda_clearCublasWorkspaces()  # a graph has one in its own pool, which nobody else frees
                return self._record(function, pool)
            except BaseException:  # also an interrupt
                self._recover(pool, stream)
                raise
            finally:
                bindings._cuda_clearCublasWorkspaces()

    def _record(self, function: Callable[[], Any], pool: Any) -> tuple[Graph, Any]:
        graph = CudaGraph()
        # other threads may go on: only what this one does must be possible in a graph
        with torch.cuda.graph(graph.graph, pool=pool, stream=self._side_stream(), capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved(self.device)
            result = function()
        graph.bytes = max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph, result

    def _side_stream(self) -> Any:
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        return self._side

    def _recover(self, pool: Any, stream: Any) -> None:
        """Leave stream, allocator and generator as outside of a recording: one that fails may leave them inside."""
        torch.cuda.set_stream(stream)
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        with contextlib.suppress(Exception):
            bindings._cuda_endAllocateToPool(index, pool)  # raises where the recording has ended
            bindings._cuda_releasePool(index, pool)
        with contextlib.suppress(Exception):
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
        with contextlib.suppress(Exception):
            torch.cuda.synchronize(self.device)


BACKENDS: dict[str, Callable[[torch.device], GraphBackend]] = {"cuda": CudaGraphs}


_RECORDING = threading.Lock()  # one recording at a time in a process


class Waiting(Exception):
    """Says which operation makes the host wait for the device, or move a tensor, so that no graph can hold it."""


_WAITING = (
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave",
)  # fmt: skip


class Rehearsal(TorchDispatchMode):
    """Watches a run before it is recorded, in this thread only.

    It raises :class:`Waiting` at an operation that no graph can hold, at which a recording would fail and could leave
    its device in disorder.

    Attributes:
        read: tensors that the run did not make itself: weights, and what functions keep from call to call. A graph
            reads them where they lie, so they must be kept as long as it.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.read: list[Tensor] = []
        self._known: set[int] = set()  # places in memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(function, "overloadpacket", function), "__name__", "")
        tensors = [value for value in args if isinstance(value, Tensor)]
        on_device = any(tensor.device.type == self.device.type for tensor in tensors)
        if name in _WAITING and on_device and (kwargs or {}).get("output_size") is None:
            raise Waiting(f"'{name}' waits for the device")
        if name in ("index", "index_put", "index_put_") and on_device and _has_mask(args):
            raise Waiting(f"'{name}' by a mask waits for the device")
        self._note([*args, *(kwargs or {}).values()], are_read=True)
        result = function(*args, **(kwargs or {}))
        self._note([result], are_read=False)
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            source = tensors[-1] if name == "copy_" else tensors[0]
            if source.device.type != result.device.type:
                raise Waiting(f"a tensor moves from {source.device} to {result.device}")
        return result

    def _note(self, values: Any, are_read: bool) -> None:
        for value in values:
            if isinstance(value, list | tuple):
                self._note(value, are_read)
            elif isinstance(value, Tensor) and (place := _place(value)) not in self._known:
                self._known.add(place)
                self.read += [value] if are_read else []


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper without memory
        return id(tensor)


def _has_mask(args: Any) -> bool:
    """Return whether a tensor is indexed by a mask; writing one number through a mask needs no indices."""
    if len(args) > 2 and isinstance(args[2], Tensor) and args[2].numel() == 1:
        return False
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)

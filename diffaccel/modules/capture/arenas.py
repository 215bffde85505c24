"""Memory of graphs: inputs at fixed addresses and a pool that graphs with equal inputs share, within a budget of bytes.

What a replay computes is copied out at once, so that graphs of one arena may use the same memory one after another: the
blocks of a network, and its calls that differ in numbers only.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.modules.capture.arguments import StaticInput, copied, map_result
from diffaccel.modules.capture.graphs import BACKENDS, Graph, GraphBackend


@dataclass(eq=False)
class Recorded:
    """One graph, its result at fixed addresses, and tensors that it reads beside its inputs."""

    graph: Graph
    result: Any
    reads: list[Tensor]


class Arena:
    """Inputs and memory of all graphs whose inputs have the same shapes, strides and dtypes.

    Attributes:
        graphs: by the unit that recorded it and its key.
        used: number of the latest replay or recording, which grows.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device, backend: GraphBackend) -> None:
        self.inputs = [StaticInput(tensor, device) for tensor in tensors]
        self.backend, self.pool = backend, backend.new_pool()
        self.graphs: dict[tuple[int, Hashable], Recorded] = {}
        self.used = 0
        self._stream: Any = None

    @property
    def bytes(self) -> int:
        """Bytes of inputs and pool."""
        graphs = sum(recording.graph.bytes for recording in self.graphs.values())
        return graphs + sum(static.bytes for static in self.inputs)

    def fill(self, tensors: list[Tensor]) -> None:
        """Copy the arguments of a call, after what another stream still does here."""
        stream = self.backend.stream()
        if self._stream is not None and stream != self._stream:
            self.backend.wait(self._stream)
        self._stream = stream
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.fill(tensor)

    def replay(self, recording: Recorded, tensors: list[Tensor]) -> Any:
        """Return the result of a call, in memory of its own."""
        self.fill(tensors)
        recording.graph.replay()
        return map_result(recording.result, copied)


@dataclass
class Account:
    """What capture did since it was put on.

    Attributes:
        replays: number of network (or block) calls that replayed a graph.
        captures: number of graphs recorded.
        eager: number of other calls, by reason.
        dropped: number of graphs given up, by reason.
        notes: sentences about the networks.
        warned: classes of modules and reasons that were logged.
    """

    replays: int = 0
    captures: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: set[str] = field(default_factory=set)
    warned: set[tuple[str, str]] = field(default_factory=set)


class Store:
    """All arenas of a pipeline's networks; over the budget, those that were not used for longest are freed.

    Args:
        budget: maximum number of bytes; None for half of the device's memory.
        benchmarks: whether cuDNN times its algorithms where a network runs without a graph.

    Attributes:
        lock: held while a graph is recorded or replayed.
    """

    def __init__(self, budget: int | None, benchmarks: bool) -> None:
        self.budget, self.benchmarks = budget, benchmarks
        self._start()

    def _start(self) -> None:
        self.arenas: dict[Hashable, Arena] = {}
        self.account = Account()
        self.lock = threading.RLock()
        self._backends: dict[torch.device, GraphBackend] = {}
        self._clock = itertools.count(1)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have: the settings. Graphs belong to the weights that they read."""
        return {"budget": self.budget, "benchmarks": self.benchmarks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def backend(self, device: torch.device) -> GraphBackend:
        """Return the backend of a device."""
        if device not in self._backends:
            self._backends[device] = BACKENDS[device.type](device)
        return self._backends[device]

    def arena(self, key: Hashable, tensors: list[Tensor], device: torch.device) -> Arena:
        """Return the arena of an input signature, made where there is none."""
        if key not in self.arenas:
            self.arenas[key] = Arena(tensors, device, self.backend(device))
        return self.arenas[key]

    def touch(self, arena: Arena) -> None:
        """Note that an arena is used now."""
        arena.used = next(self._clock)

    @property
    def bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.bytes for arena in self.arenas.values())

    @property
    def graphs(self) -> int:
        """Number of all graphs."""
        return sum(len(arena.graphs) for arena in self.arenas.values())

    def fit(self, arena: Arena) -> str | None:
        """Free other arenas until the budget holds; where this one alone exceeds it, free it and return the reason."""
        budget = self.budget if self.budget is not None else arena.backend.memory() // 2
        others = sorted((a for a in self.arenas.values() if a is not arena), key=lambda a: a.used)
        while others and self.bytes > budget:
            self.free(others.pop(0), "over the budget")
        if self.bytes <= budget:
            return None
        needed = arena.bytes
        self.free(arena, "over the budget")
        return f"its graph needs {needed / 2**30:.2f} GiB, and budget_gib is {budget / 2**30:.2f}"

    def free(self, arena: Arena, reason: str) -> None:
        """Give up an arena with all of its graphs."""
        self.account.dropped[reason] += len(arena.graphs)
        arena.graphs.clear()
        self.arenas = {key: other for key, other in self.arenas.items() if other is not arena}

    def drop(self, owner: int, reason: str) -> int:
        """Give up the graphs of one unit; return the number of them."""
        count = 0
        for arena in list(self.arenas.values()):
            for name in [name for name in arena.graphs if name[0] == owner]:
                del arena.graphs[name]
                self.account.dropped[reason] += 1
                count += 1
            if not arena.graphs:
                self.free(arena, reason)
        return count

    def clear(self) -> None:
        """Free everything."""
        for arena in list(self.arenas.values()):
            self.free(arena, "removed")

"""What the host knows of a pipeline call's timesteps and conditions, so that it need not wait for the device to ask.

A timestep on a device can be read only by waiting. The first pipeline call with a schedule does; the next ones with the
same schedule know which timesteps to expect. Rows are found on the device by the timestep's bits in any case, and a
timestep that was not expected is noticed at the end of the call.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.modules.temporal.arguments import bytes_of

WAITING = ["cuda"]  # device types whose contents the host must wait for
MOST_RECENT = 8  # sets of conditions that are known by their identity


def is_waited_for(tensor: Tensor) -> bool:
    """Return whether the host waits for a device to read a tensor."""
    return tensor.device.type in WAITING


@dataclass(frozen=True, eq=False)
class _Known:
    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    digest: bytes


class Conditions:
    """Digests of tensors by their contents, which are read once for each set of the same unchanged objects."""

    def __init__(self) -> None:
        self.reads = 0
        self._recent: OrderedDict[tuple[int, ...], _Known] = OrderedDict()

    def digest(self, tensors: Sequence[Tensor]) -> bytes:
        """Return the digest of the contents of tensors."""
        if not tensors:
            return b""
        objects = tuple(map(id, tensors))
        known = self._recent.get(objects)
        versions = _versions(tensors)
        if known is not None and known.versions == versions and versions is not None:
            if all(ref() is tensor for ref, tensor in zip(known.tensors, tensors, strict=True)):
                return known.digest
        self.reads += sum(map(is_waited_for, tensors))
        hashed = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            hashed.update(bytes_of(tensor).cpu().numpy().tobytes())
        digest = hashed.digest()
        if versions is not None:
            self._recent[objects] = _Known(tuple(map(weakref.ref, tensors)), versions, digest)
            while len(self._recent) > MOST_RECENT:
                self._recent.popitem(last=False)
        return digest


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    try:
        return tuple(tensor._version for tensor in tensors)
    except RuntimeError:  # tensors of inference mode count no changes
        return None


@dataclass(eq=False)
class Plan:
    """The timesteps that calls of one schedule ask for, by their keys.

    Attributes:
        is_complete: whether a pipeline call with this schedule has ended.
    """

    times: dict[bytes, Tensor] = field(default_factory=dict)
    is_complete: bool = False


class Generation:
    """One pipeline call.

    Args:
        pipe: the pipeline.
        label: names the loop that makes its network calls.
        plans: of earlier pipeline calls.
    """

    def __init__(self, pipe: Any, label: Hashable, plans: OrderedDict[Hashable, Plan]) -> None:
        self.pipe, self._label, self._plans = pipe, label, plans
        self._own: dict[Hashable, Plan] = {}
        self._missed: Tensor | None = None
        self._schedule: bytes | None = None
        self.predicted: set[int] = set()  # blocks that were asked for already
        self.has_looked = False  # at the bits of the weights

    def plan(self, kind: Hashable) -> Plan:
        """Return the plan of this call's schedule for a kind of network call."""
        if kind not in self._own:
            key = (kind, self._label, self._bits_of_schedule())
            self._own[kind] = self._plans.setdefault(key, Plan())
            self._plans.move_to_end(key)
        return self._own[kind]

    def _bits_of_schedule(self) -> bytes:
        if self._schedule is None:
            timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
            self._schedule = b""
            if isinstance(timesteps, Tensor):
                self._schedule = str(timesteps.dtype).encode() + bytes_of(timesteps).cpu().numpy().tobytes()
        return self._schedule

    def expect(self, is_found: Tensor) -> None:
        """Note, on the device, whether a row was found."""
        missed = torch.logical_not(is_found)
        self._missed = missed if self._missed is None else torch.logical_or(self._missed, missed)

    def end(self) -> None:
        """Complete the plans.

        Raises:
            DiffAccelError: when a timestep was asked for that the schedule had not had before.
        """
        if self._missed is not None and bool(self._missed):
            for plan in self._own.values():
                plan.is_complete = False
            raise DiffAccelError(
                "A network call had a timestep that earlier calls with the same schedule did not have, and 'tib' had "
                "no row for it: discard the result and call again, which reads every timestep. A callback or a loop "
                "that changes timesteps from call to call does this; use TIB(trust=False) there."
            )
        for plan in self._own.values():
            plan.is_complete = True

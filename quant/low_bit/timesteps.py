"""The group of each sample's noise level, read from the time that a network is called with."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.modules.stand_in import uncompiled

_NAMES = ("timestep", "timesteps", "t", "sigma")  # of a network's time argument


class TimeGroups:
    """A hook before a network's forward: group ``min(G - 1, floor(G t / T))`` of every sample.

    The group follows from the time alone, whatever the schedule and the number of calls in a step. Several times a
    sample, one a token, count by the largest. Layers look up :attr:`index`, which stays on the network's device.

    Several threads may call one network: each looks up the groups of its own call. A thread that calls none, as
    autograd's, which computes activations again, has those of the latest call.

    Attributes:
        count: number of groups, G.
        largest: time of pure noise, T.
    """

    def __init__(self, count: int, largest: float, position: int) -> None:
        self.count, self.largest, self.position = count, largest, position
        self._latest: Tensor | None = None
        self._own = threading.local()

    @property
    def index(self) -> Tensor | None:
        """Groups of the samples of the call, int64 ``(B,)``; None outside of calls with a time."""
        own: Tensor | None = getattr(self._own, "index", self._latest)
        return own

    @index.setter
    def index(self, value: Tensor | None) -> None:
        self._latest = self._own.index = value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _own=threading.local())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)
        if time is None and 0 <= self.position < len(args):
            time = args[self.position]
        if time is None:
            self.index = None
            return
        if isinstance(time, Tensor) and time.device.type != "cpu":  # weights may lie elsewhere until they are used
            self.index = self.groups(time)
            return
        device = next(module.parameters()).device
        self.index = self.groups(torch.as_tensor(time, dtype=torch.float32)).to(device)

    def groups(self, time: Tensor) -> Tensor:
        """Return the group of each sample.

        Raises:
            DiffAccelError: for a time outside of 0..T, as far as that is known without waiting for a device.
        """
        times = time.reshape(1) if time.ndim == 0 else time.flatten(1).amax(dim=1) if time.ndim > 1 else time
        if times.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (float(f()) for f in (times.min, times.max)) if len(times) else (0.0, 0.0)
            if not (-1e-3 * self.largest <= low and high <= self.largest * 1.001):
                raise DiffAccelError(
                    f"The network was called at time {high if high > self.largest else low:g}; it must be within 0 and "
                    f"{self.largest:g}, the time of pure noise."
                )
        place = torch.floor(times.float() * (self.count / self.largest)).to(torch.int64)
        return place.clamp(0, self.count - 1)


def attach(network: nn.Module, layers: list[Any], count: int, largest: float | None = None) -> None:
    """Put the hook on a network, once, and let layers look up their group there.

    Args:
        layers: with an attribute ``time``.
        largest: time of pure noise; that of the network's family, or 1000.
    """
    detach(network)
    if count <= 1 or not layers:
        return
    if largest is None:
        try:
            largest = float(facts_of(network).timestep_range[1])
        except DiffAccelError:
            largest = 1000.0
    names = [name for name in inspect.signature(type(uncompiled(network)).forward).parameters if name != "self"]
    position = next((names.index(name) for name in _NAMES if name in names), -1)
    groups = TimeGroups(count, largest, position)
    network.register_forward_pre_hook(groups, with_kwargs=True)
    for layer in layers:
        layer.time = groups


def detach(network: nn.Module) -> None:
    """Take the hook off."""
    for key, hook in list(network._forward_pre_hooks.items()):
        if isinstance(hook, TimeGroups):
            del network._forward_pre_hooks[key]
            network._forward_pre_hooks_with_kwargs.pop(key, None)


def factors(clip: Tensor, time: TimeGroups | None, rows: int) -> Tensor:
    """Return the clipping factors ``(B, 2)`` of the samples that ``rows`` belong to.

    Rows that are not the same number for every sample, and calls without a time, take the mean of the groups at hand.
    """
    if len(clip) == 1:
        return clip
    if time is None or time.index is None:
        return clip.mean(dim=0, keepdim=True)
    chosen = clip[time.index]
    if len(chosen) > 1 and rows % len(chosen):
        return chosen.mean(dim=0, keepdim=True)
    return chosen

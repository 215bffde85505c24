"""Weights of replaced modules, kept in the memory of the host while tables stand for what they compute.

While they rest there, each parameter has its shape, dtype and device, and one element of memory on the device: what
asks for these goes on, what reads the numbers finds not-a-number, and what writes them raises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError


@dataclass(eq=False)
class Rest:
    """A parameter whose numbers rest on the host.

    Attributes:
        host: its numbers.
        place: address of what stands for them.
    """

    parameter: nn.Parameter
    host: Tensor
    place: int


class Weights:
    """Moves parameters of a network to the host and back.

    Args:
        network: whose modules outside of the replaced ones keep their weights, also those that they share.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._resting: dict[int, Rest] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the device that are free because of it."""
        return sum(rest.host.numel() * rest.host.element_size() for rest in self._resting.values())

    def offload(self, names: set[str]) -> None:
        """Move the parameters inside of modules to the host, by the modules' names."""
        inside: dict[int, nn.Parameter] = {}
        outside: set[int] = set()
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            if any(name.startswith(f"{module}.") for module in names):
                inside[id(parameter)] = parameter
            else:
                outside.add(id(parameter))
        with torch.inference_mode(False), torch.no_grad():
            for key, parameter in inside.items():
                if key not in outside and key not in self._resting and type(parameter.data) is Tensor:
                    host, one = _on_host(parameter.data), _nan_of(parameter.data)
                    self._resting[key] = Rest(
                        parameter, host, one.data_ptr()
                    )  # noted first, should this be interrupted
                    parameter.data = one

    def restore(self) -> bool:
        """Move everything back to where its stand-ins are; return whether anything was away.

        What an interrupt or a full device leaves away stays noted, and the next call moves it back.
        """
        was_away = bool(self._resting)
        with torch.inference_mode(False), torch.no_grad():
            while self._resting:
                key, rest = next(reversed(self._resting.items()))
                device = rest.parameter.device
                rest.parameter.data = rest.host.to(device, non_blocking=True) if device.type == "cuda" else rest.host
                del self._resting[key]
        return was_away

    def check(self) -> None:
        """Raise where somebody has written to a parameter that is away."""
        for rest in self._resting.values():
            if rest.parameter.data_ptr() != rest.place:
                self.restore()
                raise DiffAccelError(
                    "Weights of modules that 'tib' replaced were changed while they rested on the host; they are back "
                    "as they were before. diffaccel.remove(pipe), change them, and accelerate again, or use "
                    "TIB(weights='device')."
                )

    def numbers(self, weight: Tensor) -> Tensor | None:
        """Return the numbers of a weight that others can write; None where they rest in memory of our own."""
        rest = self._resting.get(id(weight))
        if rest is None:
            return weight.detach()
        return rest.host if rest.parameter.device.type == "cpu" else None

    def fetch(self, weight: Tensor, device: torch.device) -> Tensor:
        """Return the numbers of a weight on a device, wherever they rest."""
        rest = self._resting.get(id(weight))
        if rest is None:
            return weight
        return rest.host.to(device, non_blocking=True)


def _on_host(data: Tensor) -> Tensor:
    """Return the numbers in the memory of the host, in the layout that they have."""
    if not data.is_cuda:
        return data
    host = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="cpu", pin_memory=True)
    return host.copy_(data)


def _nan_of(data: Tensor) -> Tensor:
    """Return what stands for the numbers: one element in their shape, not-a-number where the dtype has it."""
    one = torch.zeros(1, dtype=data.dtype, device=data.device)
    if data.dtype.is_floating_point:
        one = torch.full((1,), float("nan"), dtype=torch.float32, device=data.device).to(data.dtype)
    return one.expand(data.shape)

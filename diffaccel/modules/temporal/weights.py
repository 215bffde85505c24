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
                    self._resting[key] = _rest(parameter)

    def restore(self) -> bool:
        """Move everything back to where its stand-ins are; return whether anything was away.

        Raises:
            DiffAccelError: for a parameter that was replaced in the meantime.
        """
        resting, self._resting = self._resting, {}
        with torch.inference_mode(False), torch.no_grad():
            for rest in resting.values():
                device = rest.parameter.device
                rest.parameter.data = rest.host.to(device, non_blocking=True) if device.type == "cuda" else rest.host
        return bool(resting)

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

    def fetch(self, weight: Tensor, device: torch.device) -> Tensor:
        """Return the numbers of a weight on a device, wherever they rest."""
        rest = self._resting.get(id(weight))
        if rest is None:
            return weight
        return rest.host.to(device, non_blocking=True)


def _rest(parameter: nn.Parameter) -> Rest:
    data = parameter.data
    if data.is_cuda:
        host = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="cpu", pin_memory=True)
        host.copy_(data)
    else:
        host = data
    one = torch.zeros(1, dtype=data.dtype, device=data.device)
    if data.dtype.is_floating_point:
        one = torch.full((1,), float("nan"), dtype=torch.float32, device=data.device).to(data.dtype)
    parameter.data = one.expand(data.shape)
    return Rest(parameter, host, parameter.data_ptr())

"""Arguments and results of a network call: their tensors, and a key of all that is not the values of these."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

ALIGNMENT = 16  # bytes; kernels are chosen by whether an address is a multiple of this
SMALL = 64  # elements
MOST_MOVED = 1024  # elements of a CPU tensor that is moved to the device at every replay, such as a timestep
PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum)


class Opaque(Exception):
    """Says why an argument or a result cannot be recorded in a graph; the call is made without one."""


def key_of(value: Any, tensors: list[Tensor]) -> Hashable:
    """Return all of a value that is not the contents of its tensors, and append these to ``tensors``.

    Of a tensor that is shape, strides, dtype, device and alignment; everything else is compared by value.

    Raises:
        Opaque: something is neither a tensor, nor a plain value, nor a container of these.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return tensor_key(value)
    if isinstance(value, float | complex):
        return type(value), repr(value)  # -0.0 is not 0.0
    if isinstance(value, PLAIN):
        return type(value), value  # True is not 1
    if type(value) in (dict, OrderedDict):
        return type(value), tuple((name, key_of(item, tensors)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(key_of(item, tensors) for item in value)
    raise Opaque(f"an argument is a {type(value).__name__}")


def tensor_key(tensor: Tensor) -> Hashable:
    """Return what a kernel depends on of a tensor beside its contents."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise Opaque(f"an argument is a {type(tensor).__name__} of the layout {tensor.layout}")
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, _misalignment(tensor)


def _misalignment(tensor: Tensor) -> int:
    """Return by how many bytes a tensor misses the alignment of kernels; 0 for one that is too small to matter.

    A timestep is such a one: the element of a list, at another place at every step.
    """
    return 0 if tensor.numel() <= SMALL else tensor.data_ptr() % ALIGNMENT


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a value of the same structure, in new containers, with other tensors in their order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, with_tensors(item, tensors)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return _rebuilt(value, [with_tensors(item, tensors) for item in value])
    return value


def map_result(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the result of a network call with every tensor changed, in new containers.

    Raises:
        Opaque: the result holds something else than tensors and plain values.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, BaseOutput):
        return type(value)(**{name: map_result(item, change) for name, item in value.items()})
    if type(value) in (dict, OrderedDict):
        return type(value)((name, map_result(item, change)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return _rebuilt(value, [map_result(item, change) for item in value])
    if isinstance(value, (*PLAIN, float, complex)):
        return value
    raise Opaque(f"it returns a {type(value).__name__}")


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors of a result, in their order."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_result(result, note)
    return tensors


def equal_to_the_bit(result: Any, other: Any) -> bool:
    """Return whether two results hold the same bits; not-a-number equals itself. Waits for the device."""
    first, second = tensors_of(result), tensors_of(other)
    return len(first) == len(second) and all(map(_equal_bits, first, second))


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in memory of its own, of the same strides where these leave no gaps."""
    return tensor.detach().clone(memory_format=torch.preserve_format)


def _rebuilt(value: Any, items: list[Any]) -> Any:
    """Return a list or tuple of the class of ``value``; named tuples take their items one by one."""
    return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)


class StaticInput:
    """A tensor at a fixed address that takes the contents of one argument before every replay.

    It has the argument's strides and alignment. An expanded argument, whose rows are one in memory, stays expanded.

    Args:
        like: the argument.
        device: of the network; a small tensor on the CPU, such as a timestep, is moved there.

    Raises:
        Opaque: the argument overlaps itself in memory, or is a large tensor of another device.

    Attributes:
        tensor: what the network is given.
    """

    def __init__(self, like: Tensor, device: torch.device) -> None:
        if like.device != device and (like.device.type != "cpu" or like.numel() > MOST_MOVED):
            raise Opaque(f"an argument of {like.numel()} elements is on {like.device}, and the network on {device}")
        self._strides = like.stride()
        sizes = zip(like.shape, self._strides, strict=True)
        self._sizes = tuple(1 if stride == 0 and size > 1 else size for size, stride in sizes)
        self._is_expanded = self._sizes != tuple(like.shape)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self._sizes, self._strides, strict=True))
        extent = extent if like.numel() else 0
        if extent < torch.Size(self._sizes).numel():
            raise Opaque("an argument overlaps itself in memory")
        offset = _misalignment(like) // like.element_size() if like.device == device else 0
        with torch.inference_mode(False):  # an inference tensor could not be changed outside of that mode
            storage = torch.zeros(offset + extent, dtype=like.dtype, device=device)
            self._target = storage.as_strided(self._sizes, self._strides, offset)
            self.tensor = storage.as_strided(like.shape, self._strides, offset)

    def fill(self, argument: Tensor) -> None:
        """Copy an argument of the same shape and strides; the host does not wait for the device."""
        if self._is_expanded:
            argument = argument.as_strided(self._sizes, self._strides, argument.storage_offset())
        self._target.copy_(argument.detach(), non_blocking=True)

    @property
    def bytes(self) -> int:
        """Bytes of its memory."""
        return self._target.numel() * self._target.element_size()

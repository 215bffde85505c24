"""The arguments of a network call: its tensors by their place, the timestep among them, and a key of all the rest."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.modules.stand_in import by_name

TIME_NAMES = ("timestep", "timesteps", "t")  # of the argument, in the networks of diffusers
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class CallArguments:
    """The arguments of one network call.

    Attributes:
        tensors: every tensor, by the place where it stands, such as ``"added_cond_kwargs.text_embeds"``.
        key: everything of the call but the contents of its tensors, and the settings of torch that change casts.
        time: place of the timestep; None where that is no tensor.
        sample: place of the latents, the network's first argument.
    """

    tensors: dict[str, Tensor]
    key: Hashable
    time: str | None
    sample: str

    @classmethod
    def of(cls, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
        """Return the arguments of ``network(*args, **kwargs)``."""
        signature: inspect.Signature = _signature(type(network))  # type: ignore[arg-type]
        named = by_name(signature.bind(network, *args, **kwargs))
        named.pop(next(iter(signature.parameters)))
        sample = next(iter(named))
        tensors: dict[str, Tensor] = {}
        plain = tuple((name, _key_of(value, name, tensors)) for name, value in sorted(named.items()))
        time = next((name for name in TIME_NAMES if name in tensors), None)
        return cls(tensors, (plain, _settings()), time, sample)


@functools.cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _settings() -> Hashable:
    kinds = ("cuda", "cpu")
    casts = tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)
    return casts, torch.is_inference_mode_enabled(), torch.get_default_dtype()


def _key_of(value: Any, place: str, tensors: dict[str, Tensor]) -> Hashable:
    """Return all of a value that is not the contents of its tensors, and note these by their place."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, _key_of(item, f"{place}.{name}", tensors)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_key_of(item, f"{place}.{i}", tensors) for i, item in enumerate(value))
    if isinstance(value, PLAIN):
        return type(value), repr(value) if isinstance(value, float | complex) else value
    return type(value), id(value)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a value with every tensor in its lists, tuples and dicts changed, in new containers."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_tensors(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(item, change) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in lists, tuples and dicts, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as bytes, in one row, on its device."""
    flat = tensor.detach().reshape(-1).contiguous()
    return flat.as_strided(flat.shape, (1,), flat.storage_offset()).view(torch.uint8)  # one element may have stride 0

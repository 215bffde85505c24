"""Single stand-ins: objects that replace one network, one text encoder or one progress bar, wherever they are put."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def uncompiled(network: Any) -> Any:
    """Return the network below ``torch.compile``."""
    return getattr(network, "_orig_mod", network)


def signature_of(module: Any) -> inspect.Signature:
    """Return the signature of a network's forward, below ``torch.compile``."""
    return inspect.signature(type(uncompiled(module)).forward)


class StandIn:
    """A callable in the place of a network.

    It is no Module, so that hooks and ``compile`` do not see it. ``isinstance`` and attributes are those of the
    network, since pipelines find their device by their modules.
    """

    def __init__(self, module: Any, called: Callable[..., Any]) -> None:
        self._module, self._called = module, called

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(*args, **kwargs)


def network_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a network call's arguments by name; dicts, which pipelines change between calls, are copied."""
    bound = signature_of(module).bind(module, *args, **kwargs).arguments
    bound.pop("self")
    bound.update(bound.pop("kwargs", {}))
    return {k: dict(v) if isinstance(v, dict) else v for k, v in bound.items()}


def random_like(like: Any, shape: tuple[int, ...], seed: int) -> Any:
    """Draw a random network output, fp32 so that the guidance fit is sharp; a list where ``like`` is one."""
    draw = torch.Generator("cpu").manual_seed(seed)
    out = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    return out.to(like.device) if isinstance(like, Tensor) else list(out.to(like[0].device).unbind())


class TextMemo:
    """Cached results of ``encode_prompt`` by the ordinal of the call: pipelines call it once per branch."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def wrap(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``encode`` with the i-th call answered from the cache where it has an i-th result."""
        ordinal = 0

        @functools.wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            nonlocal ordinal
            if ordinal == len(self.results):
                self.results.append(encode(*args, **kwargs))
            ordinal += 1
            return self.results[ordinal - 1]

        return encode_prompt


def silent_bar(original: Callable[..., Any], iterable: Any = None, total: int | None = None) -> Any:
    """Return a disabled progress bar in the place of ``original(iterable, total)``."""
    from tqdm.auto import tqdm

    return tqdm(iterable, total=total, disable=True)


def clone(generator: Any) -> Any:
    """Return an independent generator of the same state, or a list of them for a list."""
    if isinstance(generator, list):
        return [clone(g) for g in generator]
    if generator is None:
        return None
    return torch.Generator(generator.device).set_state(generator.get_state())

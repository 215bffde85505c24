"""A step cache on the blocks of a network: they are passed through at skipped steps, and the last returns the forecast.

Each block gets a class of its own kind whose call asks the cache first, so that hooks, adapters, offloading and
compiled forwards of the block work as ever, whether they come before or after. Names and weights stay. A network
without such blocks (a UNet, whose blocks pass skips to each other) is one block of itself, and its output is forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.modules.like_class import like_class, once_a_class
from diffaccel.modules.network_call import NetworkCall, current
from diffaccel.modules.stand_in import signature_of
from diffaccel.modules.step_cache.cache import CachedCall, StepCache

_PLACE = "_diffaccel_place"


class BlockStack:
    """The blocks of one network under one cache.

    Args:
        blocks: in the order in which they run.
        hidden_output: position of the image tokens in what a block returns, where that is a tuple.
        probes: number of first blocks that run at every step, for a decision that looks at what they compute.
    """

    def __init__(self, cache: StepCache, blocks: Sequence[nn.Module], hidden_output: int = 0, probes: int = 0) -> None:
        self.cache, self.blocks, self.hidden_output = cache, list(blocks), hidden_output
        self.probes = probes
        self._turn: CachedCall | None = None
        self._entered: Tensor | None = None

    def install(self) -> None:
        """Give every block its class; :meth:`remove` undoes it."""
        for number, block in enumerate(self.blocks):
            if facts := vars(block).get(_PLACE):
                raise DiffAccelError(f"A {facts.stack.cache.__class__.__name__} is on these blocks already. Remove it.")
            cls: Any = type(block)
            vars(block)[_PLACE] = _Place(self, number, cls)
            block.__class__ = _cached_class(cls)

    def remove(self) -> None:
        """Give every block its original class back; may be called twice."""
        for block in self.blocks:
            place = vars(block).get(_PLACE)
            if place is not None and place.stack is self:
                block.__class__ = place.original
                vars(block).pop(_PLACE, None)

    def call(self, number: int, block: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer the call of block ``number``, ``plain(*args, **kwargs)`` where it runs."""
        network_call = current()
        if network_call is None:
            return plain(*args, **kwargs)
        if number < self.probes:
            self._entered = _hidden(block, args, kwargs) if number == 0 else self._entered
            return plain(*args, **kwargs)
        if number == self.probes:
            self._begin(network_call, _hidden(block, args, kwargs))
        turn = self._turn
        if turn is None or turn.call is not network_call:
            raise DiffAccelError(
                f"Block {number} of {type(block).__name__} ran without the blocks before it, so that a cache cannot "
                "tell what it computes. Leave out what skips blocks (skip_layer_guidance), or the cache."
            )
        is_last = number == len(self.blocks) - 1
        if turn.skips:
            hidden = self.cache.forecast_output(turn) if is_last else _hidden(block, args, kwargs)
            self._turn = None if is_last else turn
            return self._like_output(block, hidden, args, kwargs)
        output = plain(*args, **kwargs)
        if is_last:
            self._turn = None
            self.cache.finish(turn, self._hidden_in(output))
        return output

    def _begin(self, call: NetworkCall, base: Tensor) -> None:
        self._turn = self.cache.begin(call, base, self._entered)
        self._entered = None

    def _hidden_in(self, output: Any) -> Any:
        """Return the image tokens in what a block returned."""
        return output[self.hidden_output] if isinstance(output, tuple) else output

    def _like_output(self, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the block would, with ``hidden`` as image tokens and the text as it was given."""
        if not issubclass(vars(block)[_PLACE].returns, tuple):
            return hidden
        text = _argument(block, "encoder_hidden_states", args, kwargs)
        return (text, hidden) if self.hidden_output else (hidden, text)


@dataclass(eq=False)
class _Place:
    """Where a block stands: its stack, its number there, its original class, and the class of what it returns."""

    stack: BlockStack
    number: int
    original: type
    returns: type = field(default=Tensor)


class Stacks:
    """Takes the caches of all networks of a pipeline off again."""

    def __init__(self, stacks: list[BlockStack]) -> None:
        self.stacks = stacks

    def remove(self) -> None:
        """Remove every cache."""
        for stack in self.stacks:
            stack.remove()


def cached_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network that a step cache is on; the network itself where it is cached as one block."""
    return [module for module in network.modules() if _PLACE in vars(module)]


@once_a_class
def _cached_class(cls: Any) -> Any:
    """Return a class of the same name whose call asks the stack of the block; copies and pickles have it too."""

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        place: _Place = vars(self)[_PLACE]

        def plain(*args: Any, **kwargs: Any) -> Any:
            output = cls.__call__(self, *args, **kwargs)
            place.returns = type(output)
            return output

        return place.stack.call(place.number, self, plain, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _rebuilt, (cls,), cls.__reduce_ex__(self, protocol)[2]

    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__call__": __call__}
    return like_class(cls, {**members, "__reduce_ex__": __reduce_ex__})


def _rebuilt(cls: Any) -> Any:
    """Return an empty block of the class that :func:`_cached_class` makes of ``cls``."""
    return cls.__new__(_cached_class(cls))


def _argument(block: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of a block's forward, by name or by position."""
    if name in kwargs:
        return kwargs[name]
    names = list(signature_of(block).parameters)[1:]
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def _hidden(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the image tokens that a block is given: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


class OutputStack(BlockStack):
    """A network that is one block of itself: its output is forecast, and nothing of it runs at skipped steps."""

    def __init__(self, cache: StepCache, network: nn.Module) -> None:
        super().__init__(cache, [network])

    def _like_output(self, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        returns = vars(block)[_PLACE].returns
        return (hidden,) if issubclass(returns, tuple) else returns(hidden)

    def _hidden_in(self, output: Any) -> Any:
        return output[0]  # of a tuple, or of the network's output class

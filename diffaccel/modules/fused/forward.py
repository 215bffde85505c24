"""What stands in the place of one block's forward."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from diffaccel.modules.fused.place import innermost, places


@dataclass(frozen=True)
class BlockKind:
    """A class of blocks that is known.

    Attributes:
        reason: returns why a call is left to the block's own forward, or None; takes the block and its arguments.
        run: computes what the forward does; takes ``folded`` too.
    """

    block: type[nn.Module]
    reason: Callable[..., str | None]
    run: Callable[..., Any]

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is of the class, or of one that changes nothing of its forward."""
        return isinstance(module, self.block) and type(module).forward is self.block.forward

    def has_signature(self) -> bool:
        """Return whether the class takes the arguments that are known of it; another version of it may not."""
        known = [name for name in inspect.signature(self.run).parameters if name not in ("block", "folded")]
        return list(inspect.signature(self.block.forward).parameters)[1:] == known


class Forward:
    """A callable in the place of a block's forward; ``torch.compile`` looks through it at the block's own.

    Attributes:
        stock: the block's own forward.
        stock_calls: calls that were left to the block's own forward, by reason.
        fused_calls: the others.
    """

    def __init__(self, block: nn.Module, kind: BlockKind, folded: bool) -> None:
        self.block, self.kind, self.folded = block, kind, folded
        self.stock = MethodType(type(block).forward, block)
        self.is_on = True
        self.before: Any = None  # its class's own forward, bound, where a tool has left that on the block
        self.fused_calls = 0
        self.stock_calls: Counter[str] = Counter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.is_on:
            return self.stock(*args, **kwargs)
        reason = self.kind.reason(self.block, *args, **kwargs)
        if reason is not None:
            self.stock_calls[reason] += 1
            return self.stock(*args, **kwargs)
        self.fused_calls += 1
        return self.kind.run(self.block, *args, **kwargs, folded=self.folded)

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(inspect.signature(type(self.block).forward).parameters.values())[1:]
        return inspect.Signature(parameters)

    def put_on(self) -> None:
        """Take the place of the block's own forward, below the hooks of offloading; :meth:`remove` undoes it."""
        place = innermost(self.block)
        self.before = place.forward
        place.values[place.key] = self

    def remove(self) -> None:
        """Give the place back, also where hooks came or went since.

        What others have put around it stays, and its calls are passed on.
        """
        self.is_on = False
        for place in places(self.block):
            if place.forward is not self:
                continue
            if self.before is not None:
                place.values[place.key] = self.before
            elif place.values is vars(self.block) and place.key == "forward":
                del place.values[place.key]
            else:
                place.values[place.key] = self.stock

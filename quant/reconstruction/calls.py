"""Calls of a network while its pipeline draws, and what its blocks get and return in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """Ends a call of the network once the block that is looked at was reached."""


@contextlib.contextmanager
def recording(network: nn.Module, every: int = 1) -> Iterator[list[Call]]:
    """Record the arguments of every n-th call that is made in the block of code."""
    calls: list[Call] = []
    count = 0

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal count
        if count % every == 0:
            calls.append((copied(args), copied(kwargs)))
        count += 1

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def copied(arguments: Any) -> Any:
    """Return arguments with tensors of their own."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), arguments)


@torch.no_grad()
def block_calls(network: nn.Module, block: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """Return what a block gets in each call of its network, which is computed as far as to the block."""
    found: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((copied(args), copied(kwargs)))
        raise _Reached

    with _hooked(block.register_forward_pre_hook(note, with_kwargs=True)):
        _call_all(network, calls)
    return found


@torch.no_grad()
def block_outputs(network: nn.Module, block: nn.Module, calls: Sequence[Call]) -> list[list[Tensor]]:
    """Return the tensors that a block returns in each call of its network."""
    found: list[list[Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append([tensor.detach().clone() for tensor in tensors_of(output)])
        raise _Reached

    with _hooked(block.register_forward_hook(note)):
        _call_all(network, calls)
    return found


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating tensors of a block's output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _call_all(network: Callable[..., Any], calls: Sequence[Call]) -> None:
    for args, kwargs in calls:
        with contextlib.suppress(_Reached):
            network(*copied(args), **copied(kwargs))


@contextlib.contextmanager
def _hooked(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()

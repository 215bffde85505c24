"""Network arguments with one row per sample: changing all of them alike, and joining several sets.

Names are dotted into dicts (``added_cond_kwargs.time_ids``); a name of a list stands for all tensors in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def map_rows(kwargs: dict[str, Any], names: Iterable[str], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return ``kwargs`` with ``change`` applied to every tensor of ``names``."""
    changed = dict(kwargs)
    for dotted in names:
        name, _, inner = dotted.partition(".")
        value = changed.get(name)
        if value is None:
            continue
        if not inner:
            changed[name] = _map_tensors(value, change)
        elif value.get(inner) is not None:
            changed[name] = {**value, inner: _map_tensors(value[inner], change)}
    return changed


def join_rows(parts: list[dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Join several sets of network arguments, the rows of ``names`` concatenated in order."""
    joined = dict(parts[0])
    for dotted in names:
        name, _, inner = dotted.partition(".")
        if joined.get(name) is None:
            continue
        if not inner:
            joined[name] = _cat([part[name] for part in parts])
        elif joined[name].get(inner) is not None:
            joined[name] = {**joined[name], inner: _cat([part[name][inner] for part in parts])}
    return joined


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _cat(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], list | tuple):
        return type(values[0])(_cat(list(items)) for items in zip(*values, strict=True))
    return values[0]

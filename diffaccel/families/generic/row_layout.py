"""The rows of samples in a network's arguments: finding, selecting and joining them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaccel.families.generic.watching import NotIdentified

# Place of the rows in a value: an axis of a tensor, the items of a list, inside a container, or nowhere (None).
Layout = int | str | dict[Any, Any] | None
ITEMS = "items"


def find_rows(value: Any, rows: int, name: str) -> Layout:
    """Return the layout of one argument of a network that was called with ``rows`` samples.

    Raises:
        NotIdentified: for a tensor with more than one axis that may be the samples'.
    """
    if isinstance(value, Tensor):
        # stacks of hidden states, one per layer, come before the samples
        axes = [axis for axis in (0, 1) if value.ndim > 3 * axis and value.shape[axis] == rows]
        if len(axes) > 1 and rows > 1:
            raise NotIdentified(
                f"its network's argument '{name}' has shape {tuple(value.shape)}: with {rows} rows, it does not show "
                "which axis is the samples'. Another batch size tells."
            )
        return axes[0] if axes else None
    if isinstance(value, dict):
        inner = {k: find_rows(v, rows, f"{name}.{k}") for k, v in value.items()}
        return inner if any(v is not None for v in inner.values()) else None
    if isinstance(value, list | tuple):
        if _axis_positions(value):
            return None
        batches = [isinstance(v, Tensor) and v.ndim > 1 and len(v) == rows for v in value]
        if len(value) == rows and not all(batches):
            return ITEMS
        places = {i: find_rows(v, rows, f"{name}[{i}]") for i, v in enumerate(value)}
        return places if any(v is not None for v in places.values()) else None
    return None


def _axis_positions(value: Any) -> bool:
    """Return whether a list holds numbers or 1-D positions, one per axis of a picture, and so no rows."""
    return all(isinstance(v, int | float) or (isinstance(v, Tensor) and v.ndim < 2) for v in value)


def map_layout(value: Any, layout: Layout, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``change``, a function of a tensor's first axis, applied to its rows."""
    if layout is None or value is None:
        return value
    if isinstance(layout, int):
        return change(value) if layout == 0 else change(value.transpose(0, layout)).transpose(0, layout)
    if layout == ITEMS:
        return type(value)(
            [value[i] for i in change(torch.arange(len(value), dtype=torch.int64, device="cpu")).tolist()]
        )
    return _rebuilt(value, {k: map_layout(value[k], inner, change) for k, inner in layout.items()})  # type: ignore[union-attr]


def join_layout(values: list[Any], layout: Layout) -> Any:
    """Join several values, rows concatenated in order; parts without rows are taken from the first."""
    first = values[0]
    if layout is None or first is None:
        return first
    if isinstance(layout, int):
        return torch.cat(values, dim=layout)
    if layout == ITEMS:
        return type(first)([item for value in values for item in value])
    return _rebuilt(first, {k: join_layout([v[k] for v in values], inner) for k, inner in layout.items()})  # type: ignore[union-attr]


def _rebuilt(value: Any, items: dict[Any, Any]) -> Any:
    """Return a container like ``value`` with new items by key or index."""
    if isinstance(value, dict):
        return {**value, **items}
    return type(value)([items[i] for i in range(len(value))])

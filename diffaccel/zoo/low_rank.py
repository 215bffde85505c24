"""Changes of matrices as products of two thin ones, of ranks that make the most of a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from torch import Tensor

_SCALE_BYTES = 4  # of each row of an int8 matrix


def factors(changes: Mapping[str, Tensor], size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``up (out, r)`` and ``down (r, in)``, ``up down ~= change``, in ``size`` bytes as int8 rows with scales.

    The best product of rank r is the singular value decomposition cut at r, and each further value ``s`` takes ``s^2``
    off the squared error for ``out + in`` numbers. So values are taken from all matrices in the order of ``s^2`` per
    byte, until the bytes are spent. Kernels of convolutions are taken as ``(out, in * k)``. A matrix that gets no
    value is left out.

    Raises:
        DiffAccelError: for a change that is not finite.
    """
    import torch

    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    worth: list[tuple[float, int, str]] = []
    for name, change in changes.items():
        if not change.isfinite().all():
            raise DiffAccelError(f"The change of tensor '{name}' is not finite; train or export it again.")
        up, values, down = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
        parts[name] = (up, values, down)
        cost = len(up) + down.shape[1] + _SCALE_BYTES
        worth += [(float(value) ** 2 / cost, cost, name) for value in values if float(value) > 0]
    ranks = dict.fromkeys(parts, 0)
    spent = dict.fromkeys(parts, 0)
    for _, cost, name in sorted(worth, reverse=True):
        first = 0 if ranks[name] else _SCALE_BYTES * len(parts[name][0])  # the scales of ``up`` come with its first
        if sum(spent.values()) + cost + first <= size:
            ranks[name] += 1
            spent[name] += cost + first
    made = {}
    for name, (up, values, down) in parts.items():
        if rank := ranks[name]:
            root = values[:rank].sqrt()
            made[name] = (
                (up[:, :rank] * root).float().contiguous(),
                (root[:, None] * down[:rank]).float().contiguous(),
            )
    return made

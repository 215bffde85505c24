"""Rows of conditionings, selected and gathered as the arguments of one network call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.session import Eval, Session

CondRows = tuple[int, tuple[int, ...] | None]  # handle of a conditioning, and which of its rows; None for all in order


@dataclass
class RowSelection:
    """The rows of one network call: a slice of the rows of one or several conditionings.

    Attributes:
        conds: the conditionings whose rows are concatenated.
        part: the slice of the concatenated rows that this call evaluates.
        total: number of concatenated rows.
    """

    session: Session
    conds: list[CondRows]
    part: slice
    total: int

    @property
    def first_cond(self) -> int:
        """Handle of the first conditioning, whose call arguments decide the guidance scale."""
        return self.conds[0][0]

    @property
    def _is_everything(self) -> bool:
        return self.part.start == 0 and self.part.stop >= self.total

    def kwargs(self, branch: str) -> dict[str, Any]:
        """Return the network's keyword arguments for the "positive", the "negative" or the "joint" branch.

        The pipeline's own joint arguments are passed on as they are when all their rows are evaluated.
        """
        if branch == "joint":
            return self._joint_kwargs()
        family = self.session.family
        parts = []
        for handle, rows in self.conds:
            kwargs = getattr(self.session.conds[handle], branch)
            if rows is not None:
                kwargs = family.map_rows(kwargs, functools.partial(_take_rows, list(rows)))
            parts.append(kwargs)
        joined = family.join_rows(parts) if len(parts) > 1 else parts[0]
        if self._is_everything:
            return joined
        return family.map_rows(joined, lambda tensor: tensor[self.part])

    def _joint_kwargs(self) -> dict[str, Any]:
        cond = self.session.conds[self.first_cond]
        is_whole_cond = len(self.conds) == 1 and self.conds[0][1] is None and self._is_everything
        if is_whole_cond and cond.joint is not None:
            return cond.joint
        return self.session.family.join_branches(self.kwargs("negative"), self.kwargs("positive"))


def rows_of(session: Session, request: Eval) -> tuple[int, ...] | None:
    """Return the call's row of every row of a request; None when they are the call's rows in order."""
    batch = len(session.x)
    if request.rows is None:
        if len(request.x) != batch:
            raise DiffAccelError(
                f"An Eval has {len(request.x)} rows, the call {batch}. Say with `rows` which row of the call each "
                "belongs to."
            )
        return None
    rows = tuple(int(row) for row in request.rows)
    if len(rows) != len(request.x) or not all(0 <= row < batch for row in rows):
        raise DiffAccelError(
            f"Eval.rows must name a row below {batch} for each of the {len(request.x)} rows of x, got {rows}."
        )
    return None if rows == tuple(range(batch)) else rows


def _take_rows(rows: list[int], tensor: Tensor) -> Tensor:
    return tensor[rows]

"""Which rows of which conditionings a network call is about, gathered as its arguments."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.session import Eval, Session


@dataclass
class Picked:
    """Rows of one or several conditionings, gathered as network arguments and kept while they stay the same."""

    session: Session
    conds: list[tuple[int, tuple[int, ...] | None]]
    pick: slice
    rows: int

    @property
    def first(self) -> int:
        return self.conds[0][0]

    @property
    def _everything(self) -> bool:
        return self.pick.start == 0 and self.pick.stop >= self.rows

    def kwargs(self, which: str) -> dict[str, Any]:
        if which == "joint":
            cond = self.session.conds[self.first]
            whole = len(self.conds) == 1 and self.conds[0][1] is None and self._everything
            if whole and cond.joint is not None:
                return cond.joint
            return self.session.family.join_branches(self.kwargs("negative"), self.kwargs("positive"))
        family = self.session.family
        parts = []
        for handle, rows in self.conds:
            kwargs = getattr(self.session.conds[handle], which)
            if rows is not None:
                kwargs = family.map_rows(kwargs, functools.partial(_take, list(rows)))
            parts.append(kwargs)
        joined = family.join_rows(parts) if len(parts) > 1 else parts[0]
        if self._everything:
            return joined
        return family.map_rows(joined, lambda t: t[self.pick])


def rows_of(session: Session, e: Eval) -> tuple[int, ...] | None:
    """The call's row of every row of an Eval; None when they are the same, in order."""
    batch = len(session.x)
    if e.rows is None:
        if len(e.x) != batch:
            raise DiffAccelError(
                f"An Eval has {len(e.x)} rows, the call {batch}. Say with `rows` which row of the call each belongs to."
            )
        return None
    rows = tuple(int(r) for r in e.rows)
    if len(rows) != len(e.x) or not all(0 <= r < batch for r in rows):
        raise DiffAccelError(
            f"Eval.rows must name a row below {batch} for each of the {len(e.x)} rows of x, got {rows}."
        )
    return None if rows == tuple(range(batch)) else rows


def _take(rows: list[int], tensor: Tensor) -> Tensor:
    return tensor[rows]

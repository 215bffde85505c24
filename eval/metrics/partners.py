"""Rows of two sets that belong together, as pictures of one prompt and seed do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partners:
    """The row of the other set that belongs to every row of a set.

    Attributes:
        of_row: its index, or -1 for none; (n,).
        alone: rows of the other set that belong to none, in their order.
    """

    of_row: Tensor
    alone: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], n: int, m: int) -> Partners:
        """Read pairs (row, row of the other set) of sets of ``n`` and ``m`` rows."""
        of_row, is_alone = torch.full((n,), -1), torch.ones(m, dtype=torch.bool)
        own, theirs = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
        of_row[own] = theirs
        is_alone[theirs] = False
        return cls(of_row, is_alone.nonzero()[:, 0])

    def with_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of some rows have a partner, and what stays of the other set: those partners, then the lone.

        Args:
            rows: indices of rows, (k,).

        Returns:
            Places in ``rows``, and indices of the other set that begin with the partners of these places.
        """
        partner = self.of_row[rows]
        has_partner = partner >= 0
        return has_partner.nonzero()[:, 0], torch.cat([partner[has_partner], self.alone])

"""A table of a report beside its metrics: equal wall time, categories, where a call's time goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled table.

    Attributes:
        key: its name in ``report.json``.
        title: as the page shows it.
        note: one or two sentences on what the table says and how it was measured.
        columns: heads of the columns.
        rows: texts, one for each column.
        data: the numbers behind the texts, JSON-ready.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"title": self.title, "note": self.note, "columns": self.columns, "rows": self.rows, **self.data}

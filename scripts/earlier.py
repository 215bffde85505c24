"""The record that an earlier run of a bench left, with which a run goes on where both measure the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def earlier(file: Path, now: Mapping[str, Any], same: Iterable[str]) -> dict[str, Any]:
    """Return the record in ``file``; an empty one without it, or where its fields ``same`` are not those now."""
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    asked = {key: now[key] for key in same}
    written = json.loads(json.dumps(asked))  # tuples are lists there
    return before if {key: before.get(key) for key in asked} == written else {}

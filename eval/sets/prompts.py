"""Prompt sets: files of a few formats, and the sets that come with the package."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError, unknown

PACKAGED = Path(str(files(__package__) / "prompt_sets"))
_PROMPT = ("prompt", "text", "caption")
_CATEGORY = ("category", "challenge", "kind", "tag")


@dataclass(frozen=True)
class Prompts:
    """Prompts in their order, each with its category or ""."""

    name: str
    texts: tuple[str, ...]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int | None) -> Prompts:
        """The first ``count`` of them; all for None."""
        return self if count is None else Prompts(self.name, self.texts[:count], self.categories[:count])


def names() -> list[str]:
    """The sets that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.jsonl"))


def read(source: str) -> Prompts:
    """The prompts of a packaged set or of a file.

    Formats: ``.txt`` (one a line, empty lines skipped), ``.jsonl`` and ``.json`` (texts, or objects with ``prompt`` and
    maybe ``category``), ``.csv`` and ``.tsv`` with such columns.

    Raises:
        DiffAccelError: for a file that is not there, cannot be read, or holds no prompt.
    """
    path = PACKAGED / f"{source}.jsonl" if source in names() else Path(source).expanduser()
    if not path.is_file():
        if "/" in source or path.suffix:
            raise DiffAccelError(f"There is no prompt file '{source}'. Give one, or a set: {', '.join(names())}.")
        raise unknown("prompt set", source, names())
    try:
        rows = list(_rows(path))
    except (OSError, ValueError, csv.Error) as error:
        raise DiffAccelError(
            f"The prompt file '{source}' cannot be read as {path.suffix or 'text'} ({error})."
        ) from error
    for number, (text, _) in enumerate(rows, 1):
        if not text.strip():
            raise DiffAccelError(f"Prompt {number} of '{source}' is empty. Take it out.")
    if not rows:
        raise DiffAccelError(f"The prompt file '{source}' holds no prompt. Write one a line.")
    texts, categories = zip(*rows, strict=True)
    return Prompts(path.stem, texts, categories)


def _rows(path: Path) -> list[tuple[str, str]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
        return [_row(row) for row in table]
    if path.suffix == ".json":
        values = json.loads(text)
        if not isinstance(values, list):
            raise ValueError("it must hold a list")
        return [_row(value) for value in values]
    lines = [line for line in text.splitlines() if line.strip()]
    return (
        [_row(json.loads(line)) for line in lines]
        if path.suffix == ".jsonl"
        else [(line.strip(), "") for line in lines]
    )


def _row(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, dict):
        raise ValueError(f"{json.dumps(value)} is neither a text nor an object")
    known = {str(key).lower(): text for key, text in value.items()}
    prompt = next((known[key] for key in _PROMPT if key in known), None)
    if not isinstance(prompt, str):
        raise ValueError(f"an entry has no {' or '.join(_PROMPT)}, but {', '.join(map(str, value)) or 'nothing'}")
    return prompt, str(next((known[key] for key in _CATEGORY if key in known), None) or "")

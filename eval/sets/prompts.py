"""Prompt sets: files in text and table formats, and the sets that come with the package."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.images.names import is_text

STDIN = "-"
PACKAGED = Path(str(files(__package__) / "prompt_sets"))
_LINE_END = re.compile(r"\r\n?|\n")  # others, such as U+2028, are part of a prompt
_PROMPT_KEYS = ("prompt", "text", "caption")
_CATEGORY_KEYS = ("category", "challenge", "kind", "tag")
_REQUEST_KEYS = {"seed": "--seed", "negative_prompt": "--negative", "negative": "--negative"}  # of a run, not a prompt


@dataclass(frozen=True)
class Prompts:
    """Prompts in order, each with its category; "" where it has none."""

    name: str
    texts: tuple[str, ...]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int | None) -> Prompts:
        """Return the set with its first ``count`` prompts; the whole set for None."""
        return self if count is None else Prompts(self.name, self.texts[:count], self.categories[:count])


def names() -> list[str]:
    """Return the names of the sets that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.jsonl"))


def read(source: str) -> Prompts:
    """Read the prompts of a packaged set, of a file, or of stdin for "-".

    Formats: ``.txt``, any other name and stdin (one a line, empty lines skipped, without comments), ``.jsonl`` and
    ``.json`` (texts, or objects with ``prompt`` and maybe ``category``), ``.csv`` and ``.tsv`` with such columns.

    Raises:
        DiffAccelError: for a file that is not there, cannot be read, or holds no prompt.
    """
    if source == STDIN:
        return _from_rows(source, "stdin", lambda: _lines(stdin_text()))
    path = PACKAGED / f"{source}.jsonl" if source in names() else Path(source).expanduser()
    if not path.is_file():
        if "/" in source or path.suffix:
            raise DiffAccelError(f"There is no prompt file '{source}'. Give one, or a set: {', '.join(names())}.")
        raise unknown("prompt set", source, names())
    return _from_rows(source, path.stem, lambda: _rows(path))


def _from_rows(source: str, name: str, read_rows: Callable[[], list[tuple[str, str]]]) -> Prompts:
    try:
        rows = read_rows()
    except UnicodeDecodeError as error:
        raise DiffAccelError(
            f"The prompt file '{source}' is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. "
            "Save it as UTF-8."
        ) from error
    except (OSError, ValueError, csv.Error) as error:
        raise DiffAccelError(
            f"The prompt file '{source}' cannot be read as {Path(source).suffix or 'text'} ({error})."
        ) from error
    for number, (text, _) in enumerate(rows, 1):
        if not text.strip():
            raise DiffAccelError(f"Prompt {number} of '{source}' is empty. Take it out.")
        if not is_text(text):
            raise DiffAccelError(f"Prompt {number} of '{source}' holds half a character, {text!a}. Write it anew.")
    if not rows:
        raise DiffAccelError(f"The prompt file '{source}' holds no prompt. Write one a line.")
    texts, categories = zip(*rows, strict=True)
    return Prompts(name, texts, categories)


def stdin_text() -> str:
    """Return all of stdin, UTF-8.

    Raises:
        DiffAccelError: in a launch, whose processes would share it.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise DiffAccelError("The processes of a launch cannot share stdin. Write the prompts to a file.")
    return sys.stdin.buffer.read().decode("utf-8-sig")


def _rows(path: Path) -> list[tuple[str, str]]:
    """Read the prompt and category of every entry of a file."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
        _check_names([name for name in table.fieldnames or () if name.strip()], "column")
        return [_row(entry) for entry in table]
    if path.suffix == ".json":
        entries = json.loads(text, object_pairs_hook=_object)
        if not isinstance(entries, list):
            raise ValueError("it must hold a list")
        return [_row(entry) for entry in entries]
    if path.suffix == ".jsonl":
        return [_row(json.loads(line, object_pairs_hook=_object)) for line in _LINE_END.split(text) if line.strip()]
    return _lines(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON text, which may hold a key twice."""
    _check_names([key for key, _ in pairs], "key")
    return dict(pairs)


def _check_names(written: Sequence[str], kind: str) -> None:
    """Raise where two columns or keys have one name, in whatever case: one of them would be left out unseen."""
    alike: dict[str, list[str]] = {}
    for name in written:
        alike.setdefault(name.strip().lower(), []).append(name)
    if twice := next((names for names in alike.values() if len(names) > 1), None):
        told = ", ".join(f"'{name}'" for name in twice)
        raise ValueError(f"{len(twice)} {kind}s have one name: {told}; rename them, or leave one")


def _lines(text: str) -> list[tuple[str, str]]:
    return [(line.strip(), "") for line in _LINE_END.split(text) if line.strip()]


def _row(entry: Any) -> tuple[str, str]:
    """Return the prompt and category of a text, or of an object with known keys in any case."""
    if isinstance(entry, str):
        return entry, ""
    if not isinstance(entry, dict):
        raise ValueError(f"{json.dumps(entry)} is neither a text nor an object")
    values = {str(key).lower(): value for key, value in entry.items()}
    if wrong := next((key for key in _REQUEST_KEYS if values.get(key) is not None), None):
        raise ValueError(f"'{wrong}' of a single prompt has no effect; take it out, and pass {_REQUEST_KEYS[wrong]}")
    key = next((key for key in _PROMPT_KEYS if key in values), None)
    if key is None:
        raise ValueError(f"an entry has no {' or '.join(_PROMPT_KEYS)}, but {', '.join(map(str, entry)) or 'nothing'}")
    if not isinstance(prompt := values[key], str):
        raise ValueError(f"the {key} of an entry is {json.dumps(prompt)}, which is no text")
    return prompt, str(next((values[key] for key in _CATEGORY_KEYS if key in values), None) or "")

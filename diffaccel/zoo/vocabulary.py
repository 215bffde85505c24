"""What an embedded model draws: its labels and the words of its captions, and which words of a prompt it never saw."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError

FILE = "vocabulary.json"
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
# words between the things of a prompt: a caption without them shows the same
_BETWEEN = frozenset(
    "a an the this that these those some any of in on at to by for from with without and or is are be it its as into "
    "over under near next my your".split()
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The words of the captions that a model was trained on.

    Attributes:
        labels: things that it draws, by category.
        styles, colours, numbers, relations: words for them.
        captions: how these make a caption.
        unseen_styles: label -> the style in which training never showed it.
        words: every word of a caption, those of tags and plurals included.
    """

    labels: dict[str, list[str]]
    styles: list[str]
    colours: list[str]
    numbers: list[str]
    relations: list[str]
    captions: list[str]
    unseen_styles: dict[str, str]
    words: list[str]

    @cached_property
    def all_labels(self) -> list[str]:
        """All labels, in the order of their categories."""
        return [label for labels in self.labels.values() for label in labels]

    def unknown(self, prompts: Iterable[str]) -> dict[str, str]:
        """Return the words of prompts that no caption has, in order, each with the nearest label, or ""."""
        known = {*self.words, *_BETWEEN}
        words = dict.fromkeys(word for prompt in prompts for word in split_words(prompt))
        return {word: self.nearest(word) for word in words if word not in known and not word.isdecimal()}

    def nearest(self, word: str) -> str:
        """Return the label that is spelt most like a word, or one with a word spelt like it; "" where none is."""
        if labels := difflib.get_close_matches(word, self.all_labels, n=1, cutoff=0.7):
            return labels[0]
        owners = {part: label for label in reversed(self.all_labels) for part in split_words(label)}
        parts = difflib.get_close_matches(word, owners, n=1, cutoff=0.82)
        return owners[parts[0]] if parts else ""


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, hyphens and apostrophes inside them kept."""
    return _WORD.findall(text.lower())


def read(folder: Path) -> Vocabulary | None:
    """Read the vocabulary of a packed model; None for a model without one.

    Raises:
        DiffAccelError: for a file that is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Vocabulary(**{key: value for key, value in values.items() if key != "format"})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DiffAccelError(f"The vocabulary '{file}' cannot be read ({error}); reinstall diffaccel.") from error

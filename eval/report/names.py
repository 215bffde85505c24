"""Names on a page: without control characters, shell-quoted as commands, short where that is enough."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffaccel.terminal import printable


def clean(text: Any) -> str:
    """Return a text on one line without control characters, which a terminal or a browser would obey."""
    return printable(" ".join(str(text).split()))


def split_key(key: str) -> tuple[str, str]:
    """Split a metric's full name into the name and the network behind it: ``clip_score`` and ``[judge]``."""
    match = re.match(r"[^\[@]+", key)
    name = match[0] if match else key
    return name, key[len(name) :]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return by full name the name without the network, where no other metric has it; else the full name."""
    unique = list(dict.fromkeys(keys))
    names = [split_key(key)[0].strip() for key in unique]
    return {key: name if names.count(name) == 1 else key for key, name in zip(unique, names, strict=True)}


def shell_line(words: Sequence[Any]) -> str:
    """Return a command as one line to be pasted into a shell, every word quoted where it must be."""
    return " ".join(_shell_word(str(word)) for word in words)


def _shell_word(word: str) -> str:
    if printable(word) == word and "\n" not in word and "\t" not in word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{printable(escaped)}'"  # as bash and zsh read escapes


def markdown_text(text: Any) -> str:
    """Return a text for Markdown: neither HTML, nor table cells, links or emphasis come out of it."""
    line = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*|~])|((?<!\w)_|_(?!\w))", r"\\\g<0>", line)
    return line.replace("](", "]\\(")


def latex_text(text: Any) -> str:
    """Return a text for LaTeX with its special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in clean(text))


_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "[": r"{[}", "]": r"{]}", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
}  # fmt: skip

"""Parts of a docstring: its first sentence, its description, and what it says of each argument."""

from __future__ import annotations

import re

_ARGUMENTS = re.compile(r"^(Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)


def first_sentence(doc: str) -> str:
    """Return the text up to the first full stop or blank line, on one line."""
    text = " ".join(doc.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].rstrip(".").replace("``", "`")


def description(doc: str) -> str:
    """Return a cleaned docstring without its section of arguments."""
    return _ARGUMENTS.sub("", doc).strip().replace("``", "`")


def documented_arguments(doc: str) -> dict[str, str]:
    """Return the ``name: text`` entries of a cleaned docstring's Args section.

    An entry may continue on deeper indented lines, and ``a, b: text`` documents both names.
    """
    section = _ARGUMENTS.search(doc)
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in (section[2] if section else "").splitlines():
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2].strip())
        elif names and line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts

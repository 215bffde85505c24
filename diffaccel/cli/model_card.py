"""``diffaccel explain`` of an embedded model: its card for readers, and what it draws."""

from __future__ import annotations

import textwrap
from typing import Any

from diffaccel import terminal
from diffaccel.zoo.vocabulary import Vocabulary

_WIDTH = 110
_HEAD = ("name", "title", "state", "licence", "note", "use", "load", "pipeline", "defaults", "quality", "acceptance")
_FILES = ("bytes", "golden", "grid", "attribution", "recipe")  # for tools, or shown at another place


def write(details: dict[str, Any], vocabulary: Vocabulary | None) -> None:
    """Write a model's card as text and tables."""
    card = details["card"]
    _paragraph(f"{details['name']} (embedded model, {details['bytes'] / 1e6:.1f} MB): {card.get('title', '')}")
    _paragraph(f"State: {card.get('state', 'unknown')}. Licence: {card.get('licence', 'unknown')}.")
    for text in (card.get("use"), card.get("note")):
        if text:
            _paragraph(str(text))
    if vocabulary is not None:
        _write_vocabulary(vocabulary)
    if card.get("load"):
        code = str(card["load"]).replace("(name)", f"({details['name']!r})")
        terminal.write(f"Load it\n  {code}\n")
    if card.get("acceptance"):
        _write_acceptance(card["acceptance"])
    for title, values in (("Measured", card.get("quality")), ("Defaults of a call", card.get("defaults"))):
        if values:
            terminal.write_table(title, ["what", "value"], _rows(values))
    others = {key: value for key, value in card.items() if key not in (*_HEAD, *_FILES)}
    if vocabulary is not None:
        others.pop("data", None)
    if others:
        terminal.write_table("About it", ["what", "value"], _rows(others))
    if card.get("attribution"):
        terminal.write("\n".join(["Credits", *(f"  {line}" for line in card["attribution"])]))
    if card.get("pipeline") == "NextFramePipeline":
        terminal.write(f"\nExample\n  diffaccel rollout {details['name']} --frames 100 --out run.mp4")
    elif "pipeline" in card:
        terminal.write(f'\nExample\n  diffaccel sample "{_example(vocabulary)}" --model {details["name"]}')


def _write_vocabulary(vocabulary: Vocabulary) -> None:
    """Write the words that a prompt may have, and every label by category."""
    lists = {
        "Styles": vocabulary.styles, "Colours": vocabulary.colours, "Numbers": vocabulary.numbers,
        "Relations": vocabulary.relations, "Captions": vocabulary.captions,
    }  # fmt: skip
    terminal.write("\n".join(f"{name}: {' | '.join(words)}" for name, words in lists.items()) + "\n")
    terminal.write(f"Things ({len(vocabulary.all_labels)})")
    for category, labels in vocabulary.labels.items():
        _paragraph(f"{category} ({len(labels)}): {', '.join(labels)}", indent="  ")
    unseen = ", ".join(f"{label} in {style}" for label, style in vocabulary.unseen_styles.items())
    _paragraph(f"Never seen in training ({len(vocabulary.unseen_styles)}): {unseen}", indent="  ")


def _write_acceptance(table: list[dict[str, Any]]) -> None:
    passed = {True: "yes", False: "no", None: "-"}
    rows = [
        [row["check"], f"{row['value']}", row["target"], f"{row.get('real', '')}", passed[row.get("passed")]]
        for row in table
    ]
    terminal.write_table("Acceptance", ["check", "value", "accepted from", "real pictures", "passed"], rows)


def _rows(values: Any, prefix: str = "") -> list[list[str]]:
    """Return nested JSON as rows of a name in words and a value."""
    rows = []
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{name}, ")
        elif isinstance(value, list):
            rows += [[name, _text(part)] for part in value]
        else:
            rows.append([name, _text(value)])
    return rows


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(part)}" for key, part in value.items())
    if isinstance(value, bool | str) or value is None:
        return f"{value}" or '""'
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _example(vocabulary: Vocabulary | None) -> str:
    return "a red apple" if vocabulary is None else f"red apple, {vocabulary.styles[0]}"


def _paragraph(text: str, indent: str = "") -> None:
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent and indent * 2, break_on_hyphens=False
    )
    terminal.write("\n".join(lines) + "\n")

"""Write the words of emoji-flux's captions beside its card.

python -m scripts.zoo.emoji.vocabulary --data data/emoji --out diffaccel/zoo/emoji-flux
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from diffaccel.files import write_text
from diffaccel.zoo.vocabulary import FILE, split_words
from scripts.zoo.emoji import captions
from scripts.zoo.emoji.fetch import WORLD, read_json
from scripts.zoo.emoji.sources import STYLES
from scripts.zoo.emoji.world import COLOURS, withheld_style

FORMAT = 1


def facts(emoji: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the vocabulary of a world's entries, JSON-ready."""
    labels = [entry["label"] for entry in emoji]
    categories = sorted({entry["category"] for entry in emoji})
    relations = (*captions.RELATIONS, "and")
    templates = [template for template, _ in captions.TEMPLATES]
    plurals = [captions.plural(label) for label in labels if captions.can_be_counted(label)]
    tags = [tag for entry in emoji for tag in entry["tags"]]
    texts = (*labels, *plurals, *tags, *STYLES, *COLOURS, *captions.NUMBERS.values(), *relations)
    plain = [re.sub(r"\{.\}", " ", template) for template in templates]
    return {
        "format": FORMAT,
        "labels": {name: [e["label"] for e in emoji if e["category"] == name] for name in categories},
        "styles": list(STYLES),
        "colours": list(COLOURS),
        "numbers": list(captions.NUMBERS.values()),
        "relations": list(relations),
        "captions": [template.format(x="WHAT", s="STYLE") for template in templates],
        "unseen_styles": {label: STYLES[style] for label in labels if (style := withheld_style(label)) is not None},
        "words": sorted({word for text in (*texts, *plain) for word in split_words(text)}),
    }


def write(folder: Path, emoji: list[dict[str, Any]]) -> None:
    """Write the vocabulary into a packed model's folder, one list a line."""
    lines = ",\n".join(f" {json.dumps(key)}: {_text(value)}" for key, value in facts(emoji).items())
    write_text(folder / FILE, f"{{\n{lines}\n}}\n")


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(part, ensure_ascii=False)}" for key, part in value.items())
    return f"{{\n{rows}\n }}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("diffaccel/zoo/emoji-flux"))
    options = parser.parse_args()
    write(options.out, read_json(options.data / WORLD)["emoji"])


if __name__ == "__main__":
    main()

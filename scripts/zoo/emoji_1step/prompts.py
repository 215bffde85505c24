"""Prompts that emoji-flux is distilled with: captions of its vocabulary, without those that evaluations draw."""

from __future__ import annotations

import random
from collections.abc import Iterable

from diffaccel.zoo.vocabulary import Vocabulary
from scripts.zoo.emoji.captions import can_be_counted, plural

SHARES = {"single": 0.40, "colour": 0.20, "count": 0.20, "pair": 0.20}


def build(vocabulary: Vocabulary, count: int, without: Iterable[str], seed: int = 0) -> list[str]:
    """Return ``count`` different prompts of every kind, none of those in ``without``."""
    generator, excluded = random.Random(seed), set(without)
    labels, countable = vocabulary.all_labels, [label for label in vocabulary.all_labels if can_be_counted(label)]

    def what(kind: str) -> str:
        label = generator.choice(countable if kind == "count" else labels)
        if kind == "colour":
            return f"{generator.choice(vocabulary.colours)} {label}"
        if kind == "count":
            return f"{generator.choice(vocabulary.numbers)} {plural(label)}"
        if kind == "pair":
            return f"{label} {generator.choice(vocabulary.relations)} {generator.choice(labels)}"
        return label

    chosen: dict[str, None] = {}
    while len(chosen) < count:
        (kind,) = generator.choices(list(SHARES), list(SHARES.values()))
        prompt = f"{what(kind)}, {generator.choice(vocabulary.styles)}"
        if prompt not in excluded:
            chosen[prompt] = None
    return list(chosen)

"""Captions of scenes: phrases, relations, counts, and the templates around them.

All text is lower case. A caption depends on the scene's facts and the ``random.Random`` that it receives only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scripts.zoo.emoji.world import COLOURS, bucket

NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
RELATED = 0.75  # share of the captions of pairs that name a relation; the others say "and"
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Template, its share of the captions. {x} is the scene's phrase, {s} the style.
TEMPLATES = (
    ("{x}, {s}", 0.35),
    ("{s} {x}", 0.20),
    ("a {s} emoji of {x}", 0.20),
    ("{x} in {s} style", 0.13),
    ("{x}", 0.08),
)
TAGS_ONLY = 0.04  # share of singles with tags instead of the label; other scenes have no tags and keep their phrase

_IRREGULAR = {
    "bison": "bison",
    "deer": "deer",
    "die": "dice",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "mango": "mangoes",
    "moose": "moose",
    "mosquito": "mosquitoes",
    "mouse": "mice",
    "ox": "oxen",
    "potato": "potatoes",
    "scarf": "scarves",
    "sheaf": "sheaves",
    "snowman": "snowmen",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    "wolf": "wolves",
}
# Adjectives, substances, games and the like, which have no plural in English.
_UNCOUNTABLE = frozenset(
    "airplane departure|badminton|biohazard|bow and arrow|bowling|bridge at night|broccoli|building construction"
    "|construction|cooked rice|cooking|couch and lamp|curry rice|dango|divide|dizzy|dna|field hockey|fondue"
    "|fork and knife with plate|garlic|high voltage|ice|ice hockey|infinity|lacrosse|locked|locked with key|luggage"
    "|maracas|mate|milky way|minus|moai|multiply|no entry|nut and bolt|oden|performing arts|ping pong|plus|popcorn"
    "|pouring liquid|prohibited|radioactive|rolling on the floor laughing|sake|salt|shaved ice|skull and crossbones"
    "|spaghetti|speaker high volume|star-struck|sushi|tennis".split("|")
)
_AFTER_HEAD = re.compile(
    r" (?:of|with|without|on|in|behind|over|from|not|savoring|blowing|holding|screaming|exhaling|fluttering|showing"
    r"|pointed|tilted|facing|curving|increasing|decreasing|vomiting)\b"
)
_SINGULAR_S = ("ss", "us", "as", "os", "tennis")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Ground truth of a scene: one label for a single or a count, two for a pair; colours are indices or None."""

    labels: tuple[str, ...]
    colours: tuple[int | None, ...]
    style: str
    count: int = 1
    stacked: bool = False  # pairs: the first is above the second instead of left of it

    @property
    def is_pair(self) -> bool:
        return len(self.labels) == 2


def _split_head(label: str) -> tuple[str, str]:
    """Split off the part that takes the plural: 'glasses' and ' of milk'."""
    match = _AFTER_HEAD.search(label)
    end = match.start() if match else len(label)
    return label[:end], label[end:]


def plural(label: str) -> str:
    """Return a label's plural: 'cats', 'glasses of milk', 'maple leaves', 'jeans'."""
    head, rest = _split_head(label)
    before, _, word = head.rpartition(" ")
    return f"{before} {_plural_word(word)}".strip() + rest


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("fish") or _is_plural_word(word):
        return word
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return f"{word[:-1]}ies"
    return f"{word}s"


def _is_plural_word(word: str) -> bool:
    return word.endswith("s") and not word.endswith(_SINGULAR_S)


def can_be_counted(label: str) -> bool:
    """Return whether a label is a countable singular: not 'cherries', 'jeans' or 'popcorn'."""
    return label not in _UNCOUNTABLE and not _is_plural_word(_split_head(label)[0].split(" ")[-1])


def phrase(label: str, colour: int | None) -> str:
    """Return a label with its colour word in front, if it has one."""
    return label if colour is None else f"{COLOURS[colour]} {label}"


def relation(facts: Facts) -> str:
    """Return the relation of the first of a pair to the second."""
    return "above" if facts.stacked else "left of"


def core(facts: Facts, rng: random.Random, *, related: bool | None = None) -> str:
    """Return the scene's phrase, without style and tags.

    A pair is "A and B" in either order, or has a relation from either side. ``related`` asks for one of these; by
    default three of four captions of a pair have a relation.
    """
    if facts.count > 1:
        return f"{NUMBERS[facts.count]} {phrase(plural(facts.labels[0]), facts.colours[0])}"
    names = [phrase(label, colour) for label, colour in zip(facts.labels, facts.colours, strict=True)]
    if not facts.is_pair:
        return names[0]
    if related is None:
        related = rng.random() < RELATED
    reverse = rng.random() < 0.5
    if reverse:
        names.reverse()
    if not related:
        return f"{names[0]} and {names[1]}"
    word = relation(facts)
    return f"{names[0]} {OPPOSITE[word] if reverse else word} {names[1]}"


def tags_of_parity(tags: Sequence[str], parity: int) -> list[str]:
    """Return the tags whose hash is even (0) or odd (1), so that the two captions of a scene share none."""
    return [tag for tag in tags if bucket(f"tag:{tag}", 2) == parity]


def caption(
    facts: Facts, rng: random.Random, *, tags: Sequence[str] = (), related: bool | None = None, plain: bool = False
) -> str:
    """Return a random caption; the same generator state gives the same words.

    Args:
        facts: the scene.
        rng: the generator.
        tags: words that may be appended to a single's caption.
        related: as in :func:`core`.
        plain: fix the template, "{x}, {s}", without tags.
    """
    x = core(facts, rng, related=related)
    if plain:
        return TEMPLATES[0][0].format(x=x, s=facts.style)
    choice = rng.random()
    for template, share in TEMPLATES:
        choice -= share
        if choice < 0:
            text = template.format(x=x, s=facts.style)
            extra = rng.sample(list(tags), min(rng.randrange(4), len(tags)))
            return ", ".join([text, *extra])
    chosen = rng.sample(list(tags), min(3, len(tags)))
    return ", ".join(chosen) if chosen else x


def contradiction(
    facts: Facts,
    seed: str,
    rng: random.Random,
    *,
    others: Sequence[str],
    styles: Sequence[str],
    tags: Sequence[str] = (),
    related: bool | None = None,
) -> str:
    """Return the caption of ``seed`` with one fact changed: the hardest negative for a text encoder.

    Everything else stays: template, tags, relation word, order of naming. A false caption that could be recognised by
    its form alone (always a relation where true ones often say "and") would teach the form and not the fact.
    Pairs: the two change places, or their colours do, or one is another thing; without a relation only the latter two.
    Counts: another number or colour. Coloured singles: another colour. Singles: another label of ``others``, or style.
    """
    true_text = caption(facts, random.Random(seed), tags=tags, related=related)
    changed = _changed(facts, rng, others=others, styles=styles, ordered=bool(related))
    text = caption(changed, random.Random(seed), tags=tags, related=related)
    if text != true_text:
        return text
    # The template does not mention what was changed (a bare label's style, a label in a list of tags).
    return caption(changed, rng, plain=True, related=related)


def _changed(facts: Facts, rng: random.Random, *, others: Sequence[str], styles: Sequence[str], ordered: bool) -> Facts:
    """Return the facts with one of them changed, as :func:`contradiction` lists them."""
    if facts.is_pair:
        choices = []
        if ordered:
            choices += [replace(facts, labels=facts.labels[::-1], colours=facts.colours[::-1])] * 3
        if facts.colours[0] != facts.colours[1]:
            choices.append(replace(facts, colours=facts.colours[::-1]))
        if others:
            choices.append(replace(facts, labels=(rng.choice(others), facts.labels[1])))
        return rng.choice(choices) if choices else replace(facts, style=rng.choice(_without(styles, facts.style)))
    if facts.count > 1 and (facts.colours[0] is None or rng.random() < 0.5):
        return replace(facts, count=rng.choice(_without(NUMBERS, facts.count)))
    if facts.colours[0] is not None:
        return replace(facts, colours=(rng.choice(_without(range(len(COLOURS)), facts.colours[0])),))
    if others and rng.random() < 0.7:
        return replace(facts, labels=(rng.choice(others),))
    return replace(facts, style=rng.choice(_without(styles, facts.style)))


def _without(values: Iterable, excluded) -> list:
    return [value for value in values if value != excluded]

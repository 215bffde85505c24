"""Which emoji are in the world: rules over emojibase groups and subgroups, as data, each with its reason.

A small world drawn well is worth more than a large one drawn badly. So emoji are left out that differ only in a detail
which 64 pixels cannot show, that are writing, or that show people (with skin tones and couples) or flags.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

# Emojibase group -> category of the world. Groups without an entry are left out whole:
# people-body (people, hands, skin tones, couples), component (skin tones, hair) and flags.
CATEGORIES = {
    "smileys-emotion": "face",
    "animals-nature": "nature",
    "food-drink": "food",
    "travel-places": "place",
    "activities": "activity",
    "objects": "object",
    "symbols": "symbol",
}

# Subgroups left out whole.
DROPPED_SUBGROUPS = {
    "cat-face": "nine cat heads that differ in the mouth; 'cat face' and 'cat' stay",
    "transport-sign": "pictograms of people and lettering on blue squares",
    "religion": "glyphs on equal purple squares",
    "zodiac": "glyphs on equal purple squares",
    "keycap": "writing",
    "alphanum": "writing",
    "currency": "writing",
    "gender": "three variants of one sign",
}

# Subgroups of which only these labels stay, since the rest is writing or repeats one sign.
KEPT_ONLY = {
    "warning": ("warning", "no entry", "prohibited", "radioactive", "biohazard"),
    "arrow": ("up arrow", "right arrow", "down arrow", "left arrow", "right arrow curving left"),
    "av-symbol": ("play button", "pause button", "stop button", "shuffle tracks button", "eject button"),
    "math": ("multiply", "plus", "minus", "divide", "infinity"),
    "punctuation": ("red question mark", "red exclamation mark", "wavy dash"),
    "other-symbol": (
        "medical symbol",
        "recycling symbol",
        "fleur-de-lis",
        "trident emblem",
        "check mark button",
        "check mark",
        "cross mark",
        "curly loop",
        "eight-spoked asterisk",
        "sparkle",
    ),
    "geometric": (
        *(f"{colour} circle" for colour in ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")),
        *(f"{colour} square" for colour in ("red", "orange", "yellow", "green", "blue", "purple", "brown")),
        "large blue diamond",
        "large orange diamond",
        "red triangle pointed up",
        "diamond with a dot",
        "radio button",
    ),
    "money": ("coin", "money bag", "dollar banknote", "money with wings", "credit card", "receipt"),
    "mail": ("envelope", "e-mail", "inbox tray", "package", "postbox"),
    "place-map": ("globe showing americas", "globe with meridians", "world map", "compass"),
    "time": ("hourglass not done", "watch", "alarm clock", "stopwatch", "timer clock", "mantelpiece clock"),
}

# Single labels left out, by reason.
DROPPED = {
    "people, or parts of their bodies, are in the picture": (
        "hamsa",
        "identification card",
        "x-ray",
        "japanese dolls",
        "joker",
        "name badge",
        "nesting dolls",
    ),
    "flags": ("flag in hole",),
    "clothes named after men and women; the same things without the word stay": (
        "man’s shoe",
        "woman’s boot",
        "woman’s clothes",
        "woman’s hat",
        "woman’s sandal",
        "rescue worker’s helmet",
    ),
    "one picture with another (or the same) name": (
        "new moon",
        "waxing crescent moon",
        "waxing gibbous moon",
        "waning gibbous moon",
        "waning crescent moon",
        "last quarter moon",
        "new moon face",
        "last quarter moon face",
        "hourglass done",
        "bus stop",
        "oncoming bus",
        "oncoming police car",
        "oncoming taxi",
        "oncoming automobile",
        "railway car",
        "high-speed train",
        "tram car",
        "light rail",
        "station",
        "mountain railway",
        "monorail",
        "suspension railway",
        "mountain cableway",
        "passenger ship",
        "motor boat",
        "ferry",
        "small airplane",
        "airplane arrival",
        "motorized wheelchair",
        "horizontal traffic light",
        "sun behind small cloud",
        "sun behind large cloud",
        "cloud with lightning and rain",
        "snowman without snow",
        "umbrella with rain drops",
        "foggy",
        "fog",
        "camping",
        "wedding",
        "cityscape at dusk",
        "sunset",
        "sunrise",
        "night with stars",
        "house with garden",
        "houses",
        "japanese post office",
        "love hotel",
        "department store",
        "office building",
        "mount fuji",
        "guide dog",
        "service dog",
        "monkey face",
        "tiger face",
        "water buffalo",
        "two-hump camel",
        "front-facing baby chick",
        "hatching chick",
        "lobster",
        "cricket",
        "beetle",
        "clinking glasses",
        "fork and knife",
        "open file folder",
        "card index dividers",
        "calendar",
        "spiral calendar",
        "round pushpin",
        "linked paperclips",
        "locked with pen",
        "unlocked",
        "chart increasing with yen",
        "page with curl",
        "bookmark tabs",
        "ledger",
        "notebook",
        "rolled-up newspaper",
        "magnifying glass tilted right",
        "camera with flash",
        "telephone receiver",
        "mobile phone with arrow",
        "low battery",
        "dvd",
        "speaker low volume",
        "speaker medium volume",
        "bell with slash",
        "musical notes",
        "hammer and pick",
        "hammer and wrench",
        "pen",
        "black nib",
        "softball",
        "rugby football",
        "ticket",
        "1st place medal",
        "2nd place medal",
        "3rd place medal",
        "tanabata tree",
        "pine decoration",
        "left speech bubble",
        "right anger bubble",
        "growing heart",
        "beating heart",
        "revolving hearts",
        "two hearts",
        "heart exclamation",
        "heart decoration",
        "heart suit",
        "frowning face with open mouth",
        "slightly frowning face",
        "slightly smiling face",
        "grinning face with smiling eyes",
        "grinning squinting face",
        "kissing face with smiling eyes",
        "kissing face with closed eyes",
        "hushed face",
        "anguished face",
        "sad but relieved face",
        "disappointed face",
        "persevering face",
        "angry face",
        "face with open eyes and hand over mouth",
        "mobile phone off",
    ),
    "writing is all there is to see": (
        "atm sign",
        "hundred points",
        "zzz",
        "map of japan",
    ),
    "hollow or faint at 64 pixels": ("dotted line face", "hole", "dashing away"),
}

_PEOPLE = re.compile(
    r"\b(wo)?m[ae]n(’s)?\b|\bperson\b|\bpeople\b|\bfamily\b|\bcouple\b|\bboys?\b|\bgirls?\b|\bskin\b|\btone\b|\bflags?\b"
)


def clean(label: str) -> str:
    """Normalise a label for captions: lower case, plain letters, no typographic marks."""
    plain = unicodedata.normalize("NFKD", label.lower().replace("’", "'"))
    return re.sub(r"\s+", " ", "".join(c for c in plain if not unicodedata.combining(c))).strip()


def mentions_people_or_flags(text: str) -> bool:
    """Return whether a label or tag mentions people or flags, which the world leaves out."""
    return bool(_PEOPLE.search(text.lower().replace("'", "’")))


def _dropped() -> set[str]:
    return {label for labels in DROPPED.values() for label in labels}


def unmatched(labels: Iterable[str]) -> list[str]:
    """Return names in the rules that no label has: a misspelt rule would silently keep what it should drop."""
    existing = {label.lower() for label in labels}
    named = _dropped() | {label for kept in KEPT_ONLY.values() for label in kept}
    return sorted(named - existing)


def select(entries: Iterable[Mapping[str, Any]], available: Iterable[set[str]]) -> list[dict[str, Any]]:
    """Select the world's emoji, in Unicode order.

    Args:
        entries: emoji with ``key, label, tags, group, subgroup``.
        available: for each style, the keys of its pictures. An emoji needs all styles, so that withholding one means
            the same for every label.
    """
    styles, dropped = list(available), _dropped()
    chosen = []
    for entry in entries:
        label, subgroup = entry["label"].lower(), entry["subgroup"]
        if entry["group"] not in CATEGORIES or subgroup in DROPPED_SUBGROUPS or label in dropped:
            continue
        if subgroup in KEPT_ONLY and label not in KEPT_ONLY[subgroup]:
            continue
        if mentions_people_or_flags(label) or not all(entry["key"] in style for style in styles):
            continue
        tags = [clean(tag) for tag in entry["tags"]]
        tags = [tag for tag in dict.fromkeys(tags) if re.fullmatch(r"[a-z][a-z ]{2,19}", tag)]
        chosen.append(
            {
                "key": entry["key"],
                "label": clean(entry["label"]),
                "tags": [tag for tag in tags if tag != clean(entry["label"]) and not mentions_people_or_flags(tag)],
                "category": CATEGORIES[entry["group"]],
                "subgroup": subgroup,
            }
        )
    return chosen

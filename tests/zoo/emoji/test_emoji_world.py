"""Splits and label rules: they depend on names alone, and keep out what has no place in the world."""

import itertools

import pytest

from scripts.zoo.emoji import labels
from scripts.zoo.emoji.world import (
    COLOURS,
    bucket,
    names_a_colour,
    withheld_colour,
    withheld_count,
    withheld_pair,
    withheld_style,
)

NAMES = [f"thing {n}" for n in range(4000)]


def test_buckets_are_the_first_eight_bytes_of_sha1():
    # printf cat | sha1sum  ->  9d989e8d27dc9e0e...
    assert bucket("cat", 2**64) == 0x9D989E8D27DC9E0E
    assert bucket("cat", 10) == 0x9D989E8D27DC9E0E % 10


def test_splits_stay_as_they_are():
    # Pinned: weights that were trained on these splits are only evaluated fairly as long as these hold.
    named = ["cat", "dog", "fox", "key", "bus", "worm", "hippopotamus", "automobile"]
    assert {n: withheld_style(n) for n in named if withheld_style(n) is not None} == {
        "worm": 0,
        "hippopotamus": 2,
        "automobile": 0,
    }
    assert [c for c in COLOURS if withheld_colour("beaver", c)] == ["blue"]
    assert withheld_count("police car", 4)
    assert not withheld_count("cat", 2)


@pytest.mark.parametrize(
    ("share", "held"),
    [
        (1 / 16, [withheld_style(n) is not None for n in NAMES]),
        (1 / 10, [withheld_colour(n, c) for n in NAMES for c in COLOURS[:3]]),
        (1 / 10, [withheld_count(n, k) for n in NAMES for k in (2, 3, 4)]),
        (1 / 20, [withheld_pair(a, b) for a, b in itertools.pairwise(NAMES)]),
    ],
)
def test_shares_are_as_promised(share, held):
    # Five standard errors of a binomial share.
    assert abs(sum(held) / len(held) - share) < 5 * (share * (1 - share) / len(held)) ** 0.5


def test_each_style_is_withheld_equally_often():
    which = [withheld_style(n) for n in NAMES]
    held = [w for w in which if w is not None]
    assert all(abs(held.count(s) / len(held) - 1 / 3) < 0.15 for s in range(3))


def test_pairs_have_no_order():
    assert all(withheld_pair(a, b) == withheld_pair(b, a) for a, b in zip(NAMES, NAMES[7:], strict=False))


def test_labels_with_a_colour_are_not_recoloured():
    assert all(names_a_colour(n) for n in ("red apple", "black cat", "light blue heart", "rainbow", "brown bear"))
    # 'tired' ends in 'red', 'greenhouse' begins with 'green'.
    assert not any(names_a_colour(n) for n in ("tired face", "cat", "greenhouse", "pinkish", "goldfish"))


def test_world_masks_follow_the_rules(world):
    for i, seen in enumerate(world.training.tolist()):
        label, style = world.labels[int(world.icon_label[i])], int(world.icon_style[i])
        assert seen == (withheld_style(label) != style)
        assert world.icon(int(world.icon_label[i]), style) == i
    red_apple = world.labels.index("red apple")
    assert not world.recolourable[red_apple]
    assert not world.colour_training[red_apple].any()


def entry(label, group="animals-nature", subgroup="animal-mammal", key="1f600", tags=()):
    return {"label": label, "group": group, "subgroup": subgroup, "key": key, "tags": list(tags)}


def test_select_keeps_what_is_drawn_in_every_style():
    both = [{"1f600", "1f601"}, {"1f600"}]
    assert [e["label"] for e in labels.select([entry("cat"), entry("dog", key="1f601")], both)] == ["cat"]


@pytest.mark.parametrize(
    "made",
    [
        entry("man", group="people-body", subgroup="person"),
        entry("flag: Chad", group="flags", subgroup="country-flag"),
        entry("light skin tone", group="component", subgroup="skin-tone"),
        entry("woman’s hat", group="objects", subgroup="clothing"),
        entry("person in bed", group="objects", subgroup="household"),
        entry("closed mailbox with raised flag", group="objects", subgroup="mail"),
        entry("Aries", group="symbols", subgroup="zodiac"),
        entry("one o’clock", group="travel-places", subgroup="time"),
        entry("family", group="symbols", subgroup="other-symbol"),
    ],
)
def test_select_leaves_out_people_flags_writing_and_repeats(made):
    assert labels.select([made], [{"1f600"}]) == []


def test_select_cleans_labels_and_tags():
    (made,) = labels.select(
        [entry("Piñata", "activities", "game", tags=["party", "man", "<3", "piñata", "Cinco de Mayo", "party"])],
        [{"1f600"}],
    )
    assert made["label"] == "pinata"
    assert made["tags"] == ["party", "cinco de mayo"]
    assert made["category"] == "activity"


def test_a_misspelt_rule_is_found():
    known = [label for dropped in labels.DROPPED.values() for label in dropped]
    known += [label for kept in labels.KEPT_ONLY.values() for label in kept]
    assert labels.unmatched(known) == []
    assert labels.unmatched(known[1:]) == [known[0]]
    assert len(known) == len(set(known)), "a label is named by two rules"

"""Tables of scenes: deterministic, true to their facts, and without what is withheld."""

import dataclasses

import pytest
import torch

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji import checks, heldout, recipe
from scripts.zoo.emoji.scenes import FILLED, KINDS, Row, Scenes, boxes, build, countable
from scripts.zoo.emoji.world import COLOURS, withheld_colour, withheld_count, withheld_pair, withheld_style


@pytest.fixture(scope="module")
def scenes(world, counts):
    return build(world, dataclasses.replace(recipe.CPU, scenes=counts), 0, "cpu")


@pytest.fixture(scope="module")
def sets(world):
    return heldout.build(world, size=24)


def test_the_same_seed_makes_the_same_scenes(world, counts, scenes):
    shared = dataclasses.replace(recipe.CPU, scenes=counts)
    again, other = build(world, shared, 0, "cpu"), build(world, shared, 1, "cpu")
    assert again.rows == scenes.rows
    assert again.captions == scenes.captions
    assert again.contradictions(1) == scenes.contradictions(1)
    assert other.rows != scenes.rows


def test_nothing_withheld_is_shown(scenes):
    for i, kind in enumerate(scenes.kind.tolist()):
        facts = scenes.facts(i)
        style = scenes.world.styles.index(facts.style)
        for label, colour in zip(facts.labels, facts.colours, strict=True):
            assert withheld_style(label) != style
            assert colour is None or not withheld_colour(label, COLOURS[colour])
        if KINDS[kind] == "count":
            assert not withheld_count(facts.labels[0], facts.count)
        if facts.is_pair:
            assert not withheld_pair(*facts.labels)


def test_held_out_sets_hold_what_was_withheld(sets):
    assert all(withheld_style(s.labels[0]) is not None for s in map(sets["style"].facts, range(len(sets["style"]))))
    for i in range(len(sets["colour"])):
        facts = sets["colour"].facts(i)
        assert withheld_colour(facts.labels[0], COLOURS[facts.colours[0]])
    for i in range(len(sets["count"])):
        facts = sets["count"].facts(i)
        assert withheld_count(facts.labels[0], facts.count)
    for name in ("pair", "colour_pair"):
        assert all(withheld_pair(*sets[name].facts(i).labels) for i in range(len(sets[name])))
    assert not {row.icons for row in sets["seen"].rows} & {row.icons for row in sets["style"].rows}


def test_real_pictures_pass_their_own_checks(sets):
    count = sets["count"]
    everything = torch.arange(len(count))
    assert checks.count(count.images(everything)).tolist() == [count.facts(i).count for i in range(len(count))]
    for size in (64, 128):
        for i in range(len(sets["colour"])):
            truth = sets["colour"].facts(i).colours[0]
            assert checks.colour(sets["colour"].images([i], size)).item() == truth
        for i in range(len(sets["colour_pair"])):
            facts = sets["colour_pair"].facts(i)
            found = checks.colours_in_order(sets["colour_pair"].images([i], size), stacked=facts.stacked)
            assert tuple(found[0].tolist()) == facts.colours


def test_plain_prompts_name_the_style_and_the_order(sets):
    for name, made in sets.items():
        for i, text in enumerate(made.plain):
            assert text.endswith(f", {made.facts(i).style}")
            assert " and " not in text, name


def test_two_captions_a_scene_and_tags_only_for_singles(scenes):
    assert all(len(texts) == len(scenes) for texts in (*scenes.captions, scenes.contradictions(0), scenes.plain))
    for k in (0, 1):
        tagged = {KINDS[kind] for kind, text in zip(scenes.kind, scenes.captions[k], strict=True) if "tag " in text}
        assert tagged == {"single"}


def test_captions_tell_the_order_where_the_table_says_so(scenes):
    for k in (0, 1):
        false = scenes.contradictions(k)
        for i, related in enumerate(scenes.related(k)):
            facts = scenes.facts(i)
            assert facts.is_pair or not related
            if facts.is_pair:
                assert (" and " not in scenes.captions[k][i]) == related == (" and " not in false[i])
            assert false[i] != scenes.captions[k][i]


def test_pictures_are_in_range_and_small_ones_are_pooled(scenes):
    index = torch.arange(0, len(scenes), 37)
    large, small = scenes.images(index), scenes.images(index, 64)
    assert large.shape[1:] == (3, 128, 128)
    assert small.shape[1:] == (3, 64, 64)
    assert large.min() >= -1
    assert large.max() <= 1
    assert torch.allclose(small, torch.nn.functional.avg_pool2d(large, 2), atol=1e-5)


def test_kept_pictures_are_the_same_to_eight_bits(world, scenes):
    rows = scenes.rows[::41]
    plain, kept, large = (Scenes(world, rows, seed=0, device="cpu") for _ in range(3))
    index = torch.arange(len(rows))
    for made in (kept.keep(64), large.keep(128)):
        assert (made.images(index, 64) - plain.images(index, 64)).abs().max() <= 1 / 127.5


def test_a_picture_does_not_depend_on_its_batch(scenes):
    index = torch.tensor([3, 90, 250, 400])
    together = scenes.images(index)
    assert all(torch.equal(scenes.images(index[i : i + 1])[0], together[i]) for i in range(4))


def test_sizes_that_do_not_divide_are_refused(scenes):
    with pytest.raises(DiffAccelError, match="divisor"):
        scenes.images(torch.tensor([0]), 96)


def test_sampling_shares_hold_whatever_the_counts(scenes):
    weights = scenes.sampler({"single": 0.75, "pair": 0.25})
    for kind, share in (("single", 0.75), ("pair", 0.25), ("count", 0.0)):
        assert weights[scenes.kind == KINDS.index(kind)].sum().item() == pytest.approx(share)
    with pytest.raises(DiffAccelError, match="Did you mean 'single'"):
        scenes.sampler({"singel": 1.0})


def test_places_stay_on_the_canvas_and_apart():
    import numpy as np

    rng = np.random.default_rng(0)
    for number, kind in ((1, "single"), (2, "pair"), (2, "count"), (3, "count"), (4, "count")):
        for _ in range(50):
            made = boxes(kind, number, rng)
            assert len(made) == number
            for x, y, size in made:
                assert size / 2 - 1e-6 <= min(x, y)
                assert max(x, y) <= 128 - size / 2 + 1e-6
            for n, (x, y, size) in enumerate(made):
                for u, v, other in made[:n]:
                    assert max(abs(x - u), abs(y - v)) >= (size + other) / 2


def test_rings_and_discs_are_countable_and_two_parts_are_not(world):
    ok = countable(world)
    assert ok[world.labels.index("cat")]
    assert not ok[world.labels.index("cherries")]  # plural already
    split = world.icons.clone()
    split[0, :, 50:78, 3] = 0
    assert not countable(dataclasses.replace(world, icons=split))[0]


def test_facts_of_a_count_name_the_thing_once(world):
    scenes = Scenes(world, [Row("count", (1, 1, 1), (4, 4, 4), FILLED * 3)], seed=0, device="cpu")
    facts = scenes.facts(0)
    assert (facts.labels, facts.colours, facts.count) == (("dog",), (4,), 3)
    assert scenes.plain == ["three blue dogs, noto"]

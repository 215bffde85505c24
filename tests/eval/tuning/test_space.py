"""The space of plans: it knows the registry and what config classes say of themselves, and no method by name."""

from __future__ import annotations

from itertools import pairwise

import pytest

from diffaccel import registry
from diffaccel.config import Config
from diffaccel.errors import DiffAccelError
from diffaccel.eval.tuning.space import OFF, TuningSpace, registered, step_numbers
from scripts.tuner_bed import METHODS, STEPS, Coarse, Drift, Echo


@pytest.fixture(scope="module")
def space():
    return TuningSpace.of(METHODS, STEPS)


def test_methods_that_exclude_each_other_share_a_slot(space):
    assert space.slots == (("drift", "echo"), ("coarse",), ("halved",), ("bent",))
    assert space.fields["echo.order"] == (2, 1, 0)
    assert set(space.distributions()) == {"slot 0", "slot 1", "slot 2", "slot 3", "steps", *space.fields}


def test_a_point_is_a_plan(space):
    plain = space.plain()
    assert space.variant(plain).name == "plain:steps=20"
    params = {**plain, "slot 0": "echo", "slot 1": "coarse", "echo.every": 3, "steps": 2}
    variant = space.variant(params)
    assert variant.methods == (Echo(every=5), Coarse(share=0.2)) and variant.call == {"steps": 16}
    assert space.variant(params, without=["echo"]).methods == (Coarse(share=0.2),)


def test_the_start_has_every_method_as_it_comes(space):
    starts = [space.variant(params) for params in space.starts()]
    for cls in METHODS.values():
        assert any(variant.methods == (cls(),) and variant.call["steps"] == STEPS for variant in starts)
    assert any(not variant.methods and variant.call["steps"] < STEPS for variant in starts)


def test_neighbours_are_one_value_away_in_what_is_on(space):
    params = {**space.plain(), "slot 0": "drift", "drift.threshold": 0}
    names = {space.variant(other).name for other in space.neighbours(params)}
    assert names == {"drift:steps=18,threshold=0.1", "drift:steps=20"}  # the default threshold is 0.2
    assert {other["slot 0"] for other in space.exchanges(params)} >= {OFF, "echo"}


def test_numbers_of_steps():
    assert step_numbers(8) == (8, 7, 6, 5, 4, 3, 2)
    assert step_numbers(1) == (1,)
    many = step_numbers(50)
    assert len(many) == 12 and many[0] == 50 and many[-1] == 12
    ratios = [b / a for a, b in pairwise(many)]
    assert max(ratios) - min(ratios) < 0.05


def test_a_field_that_is_none():
    class Wrong(Drift):
        @classmethod
        def tunable(cls):
            return {"threshhold": (1, 2)}

    with pytest.raises(DiffAccelError, match="'drift' calls 'threshhold' tunable, which is no field"):
        TuningSpace.of({"drift": Wrong}, 8)


def test_what_is_tuned_of_the_registry():
    """Samplers by their steps, and whatever else says what may be tuned.

    Searches, compositions of several prompts and the stock loop's rule are not.
    """
    chosen = registered()
    for name in registry.METHODS:
        cls = registry.config_class(name)
        is_sampler = cls.touches == "loop" and not (cls.searches or cls.composes or cls.is_stock_rule)
        searches = cls.touches == "loop" and cls.searches
        assert (name in chosen) == (not searches and (is_sampler or bool(cls.tunable()))), name
    assert Config.tunable() == {}
    assert list(registered(["scheduler"])) == ["scheduler"]
    with pytest.raises(DiffAccelError, match="'bon' is a search"):
        registered(["bon"])
    with pytest.raises(DiffAccelError, match=r"Unknown method 'eulr'\. Did you mean 'euler'"):
        registered(["eulr"])

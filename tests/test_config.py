"""Configs: frozen, keyword-only, checked when made, and equal after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from diffaccel import registry
from diffaccel.config import ORDER, Config, SamplerConfig, Touches
from diffaccel.errors import DiffAccelError

CLASSES = [c for c in map(registry.config_class, registry.METHODS) if issubclass(c, Config)]
every_config = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.name)


@dataclass(frozen=True, kw_only=True)
class Everything(Config):
    """One field of every kind."""

    name: ClassVar[str] = "everything"
    touches: ClassVar[Touches] = "blocks"

    needed: str
    count: int = 3
    share: float = 0.5
    switch: bool = False
    mode: Literal["fast", "exact"] = "fast"
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    maybe: float | None = None
    maybe_mode: Literal["a", "b"] | None = None
    stages: tuple[int, ...] | None = None
    words: dict[str, Any] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        if self.pair[0] > self.pair[1]:
            raise DiffAccelError(f"Everything.pair is {self.pair}; the first must not exceed the second.")


FULL = Everything(
    needed="a", count=4, share=1e-7, switch=True, mode="exact", sizes=(1, 2), pair=(0.25, 1.0), maybe=0.5,
    stages=(4, 2), words={"one": 1},
)  # fmt: skip


def _other_values(config: Config) -> list[Config]:
    """Return configs that differ from ``config`` in one field, of the values that it accepts."""
    hints, others = typing.get_type_hints(type(config)), []
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        choices: list[Any] = list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []
        if isinstance(value, bool):
            choices = [not value]
        elif isinstance(value, int | float):
            choices = [value + 1, value / 2, value // 2]
        elif value is None:
            samples: dict[Any, Any] = {float: 0.5, int: 8, bool: True}
            choices = [samples[kind] for kind in typing.get_args(hint) if kind in samples]
        for choice in choices:
            try:
                other = dataclasses.replace(config, **{field.name: choice})
            except DiffAccelError:
                continue
            if other != config:
                others.append(other)
    return others


def _through_json(config: Config) -> Config:
    return type(config).from_dict(json.loads(json.dumps(config.to_dict())))


# -- every registered method -----------------------------------------------------------------------------------------


@every_config
def test_round_trip_through_json(cls: type[Config]) -> None:
    default = cls()
    assert default.to_dict()["name"] == cls.name
    assert _through_json(default) == default
    others = _other_values(default)
    assert len(others) >= len(dataclasses.fields(cls)) // 2
    for other in others:
        assert _through_json(other) == other != default


@every_config
def test_unknown_option_names_the_nearest(cls: type[Config]) -> None:
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(
        DiffAccelError, match=rf"Unknown option of {cls.__name__} '{field}s'.*Did you mean '{field}'"
    ) as error:
        cls.from_dict({f"{field}s": 1})
    for option in dataclasses.fields(cls):
        assert option.name in str(error.value)


@every_config
def test_a_value_of_the_wrong_type_is_one_sentence(cls: type[Config]) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if hints[field.name] is Any:
            continue
        with pytest.raises(DiffAccelError) as error:
            cls(**{field.name: (value := [object()])})
        message = str(error.value)
        assert message.startswith(f"{cls.__name__}.{field.name} is {value!r}; it must be ")
        assert message.endswith(".")
        assert "\n" not in message


@every_config
def test_frozen_and_keyword_only(cls: type[Config]) -> None:
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), field, getattr(cls(), field))
    with pytest.raises(TypeError, match="positional"):
        cls(getattr(cls(), field))


@every_config
def test_class_facts(cls: type[Config]) -> None:
    assert registry.config_class(cls.name) is cls
    assert cls.touches in ORDER
    assert "arXiv" in cls.citation
    assert set(cls.conflicts) <= set(registry.METHODS)
    if issubclass(cls, SamplerConfig):
        assert cls.touches == "loop"
        assert cls.sample is not SamplerConfig.sample
        with pytest.raises(DiffAccelError, match=rf"{cls.__name__}.max_batch is -1; it must be 0"):
            cls(max_batch=-1)
        with pytest.raises(DiffAccelError, match="one of 'float32', 'stock'"):
            cls(state="bfloat16")


# -- every kind of field ---------------------------------------------------------------------------------------------


def test_every_kind_of_field_survives_json() -> None:
    again = _through_json(FULL)
    assert again == FULL
    assert isinstance(again.stages, tuple)  # also behind `| None`, where JSON has lists
    assert _through_json(Everything(needed="b")) == Everything(needed="b")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"needed": 1}, "Everything.needed is 1; it must be str."),
        ({"count": 1.0}, "Everything.count is 1.0; it must be int."),
        ({"count": True}, "Everything.count is True; it must be int."),
        ({"count": "3"}, "Everything.count is '3'; it must be int."),
        ({"share": "half"}, "Everything.share is 'half'; it must be float."),
        ({"share": False}, "Everything.share is False; it must be float."),
        ({"switch": 1}, "Everything.switch is 1; it must be bool."),
        ({"mode": "slow"}, "Everything.mode is 'slow'; it must be one of 'fast', 'exact'."),
        ({"maybe_mode": "slow"}, "Everything.maybe_mode is 'slow'; it must be one of 'a', 'b', or None."),
        ({"sizes": [1]}, "Everything.sizes is [1]; it must be tuple[int, ...]."),
        ({"sizes": (1, "2")}, "Everything.sizes is (1, '2'); it must be tuple[int, ...]."),
        ({"pair": (1.0,)}, "Everything.pair is (1.0,); it must be tuple[float, float]."),
        ({"maybe": "no"}, "Everything.maybe is 'no'; it must be float | None."),
        ({"share": math.nan}, "Everything.share is nan; it must be float, and finite."),
        ({"share": "nan"}, "Everything.share is 'nan'; it must be float, and finite."),
        (
            {"share": 10**400},
            f"Everything.share is {repr(10**400)[:60]} ... (321 more characters) ... {'0' * 20}; it must be float.",
        ),
        ({"maybe": -math.inf}, "Everything.maybe is -inf; it must be float | None, and finite."),
        ({"pair": (0.0, math.inf)}, "Everything.pair is (0.0, inf); it must be tuple[float, float], and finite."),
        ({"words": {"a": [math.nan]}}, "Everything.words is {'a': [nan]}; it must be dict[str, Any], and finite."),
        ({"words": []}, "Everything.words is []; it must be dict[str, Any]."),
        ({"pair": (2.0, 1.0)}, "Everything.pair is (2.0, 1.0); the first must not exceed the second."),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffAccelError) as error:
        dataclasses.replace(FULL, **values)
    assert str(error.value) == message


def test_a_text_where_a_list_is_asked_for_says_how_to_write_one() -> None:
    with pytest.raises(DiffAccelError, match=r"in brackets, and in a shell in quotes: '\[1, 2\]'\.$"):
        dataclasses.replace(FULL, sizes="1,2")
    with pytest.raises(DiffAccelError, match=r"in quotes: '\[1, 2\]'\.$"):
        dataclasses.replace(FULL, stages="1,2")  # also behind `| None`


@every_config
def test_no_number_of_a_method_is_infinite_or_not_a_number(cls: type[Config]) -> None:
    for field, hint in typing.get_type_hints(cls).items():
        if hint in (float, float | None):
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(
                    DiffAccelError, match=rf"{cls.__name__}\.{field} is -?(nan|inf); it must be .*, and finite"
                ):
                    cls(**{field: value})


def test_an_integer_is_a_float() -> None:
    assert dataclasses.replace(FULL, share=1, pair=(0, 1), maybe=2).share == 1


def test_a_missing_option_is_named() -> None:
    with pytest.raises(DiffAccelError, match="Everything needs needed; got count"):
        Everything.from_dict({"count": 1})


def test_values_from_json_are_checked_too() -> None:
    with pytest.raises(DiffAccelError, match=r"Everything.sizes is \['a'\]; it must be tuple"):
        Everything.from_dict({"needed": "a", "sizes": ["a"]})


def test_options_of_another_method_are_refused() -> None:
    """Many methods share their options: a record of one must not load as another."""
    euler, heun = (registry.config_class(name) for name in ("euler", "heun"))
    with pytest.raises(DiffAccelError, match=r"options of 'euler', not of 'heun' \(Heun\)"):
        heun.from_dict(euler().to_dict())

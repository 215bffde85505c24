"""What may be tuned: methods of the registry that fit each other, their tunable fields, and the number of steps.

A point of the space is a dict of parameters as Optuna has them; a plan is the :class:`Variant` that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from diffaccel import registry
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.runs.variant import Variant

OFF, STEPS = "off", "steps"
MOST_STEPS = 12  # different numbers of steps
Params = dict[str, Any]


@dataclass(frozen=True)
class TuningSpace:
    """Methods and numbers of steps to choose from.

    Attributes:
        methods: config classes by name.
        fields: by ``name.field``, its values in order of growing speed.
        steps: numbers of steps in order of growing speed; the first one is the baseline's.
        slots: methods that exclude each other; one of each slot at most is on.
    """

    methods: dict[str, Any]
    fields: dict[str, tuple[Any, ...]]
    steps: tuple[int, ...]
    slots: tuple[tuple[str, ...], ...] = field(default=())

    @classmethod
    def of(cls, methods: Mapping[str, Any], steps: int) -> TuningSpace:
        """Return the space of some config classes and at most ``steps`` steps."""
        values = {
            f"{name}.{key}": tuple(choices)
            for name, config_class in methods.items()
            for key, choices in config_class.tunable().items()
            if len(choices) > 1
        }
        for key in values:
            name, _, option = key.partition(".")
            if option not in {f.name for f in fields(methods[name])}:
                raise DiffAccelError(f"The method '{name}' calls '{option}' tunable, which is no field of it. Mend it.")
        return cls(dict(methods), values, step_numbers(steps), _slots(methods))

    def variant(self, params: Params, without: Sequence[str] = ()) -> Variant:
        """Return the plan of a point; of methods that clash, the earlier slot's stays on.

        Args:
            params: a point.
            without: methods that are off whatever the point says, since they do not run here.

        Raises:
            DiffAccelError: for options that do not fit together.
        """
        chosen: list[str] = []
        for slot in range(len(self.slots)):
            name = params[_slot(slot)]
            if name != OFF and name not in without and not any(self._clash(name, other) for other in chosen):
                chosen.append(name)
        configs = tuple(self._config(name, params) for name in chosen)
        return Variant(configs, {STEPS: self.steps[params[STEPS]]})

    def _config(self, name: str, params: Params) -> Any:
        options = {
            key.partition(".")[2]: choices[params[key]]
            for key, choices in self.fields.items()
            if key.partition(".")[0] == name
        }
        return self.methods[name](**options)

    def _clash(self, first: str, second: str) -> bool:
        return _excludes(self.methods[first], self.methods[second])

    def distributions(self) -> dict[str, Any]:
        """Return Optuna's distribution of every parameter."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        slots = {_slot(i): CategoricalDistribution([OFF, *names]) for i, names in enumerate(self.slots)}
        sizes = {STEPS: len(self.steps), **{key: len(choices) for key, choices in self.fields.items()}}
        return {**slots, **{key: IntDistribution(0, size - 1) for key, size in sizes.items()}}

    def plain(self) -> Params:
        """Return the point of the baseline, every field at its default or, where that is no choice, in the middle."""
        point: Params = {_slot(i): OFF for i in range(len(self.slots))} | {STEPS: 0}
        for key, choices in self.fields.items():
            name, _, option = key.partition(".")
            default = next(f.default for f in fields(self.methods[name]) if f.name == option)
            point[key] = choices.index(default) if default in choices else len(choices) // 2
        return point

    def starts(self) -> list[Params]:
        """Return the points to begin with: each method as it comes, then fewer steps, then each method with fewer."""
        plain = self.plain()
        middle = len(self.steps) // 2
        alone = [{**plain, _slot(i): name} for i, names in enumerate(self.slots) for name in names]
        ladder = [{**plain, STEPS: i} for i in _spread(len(self.steps))]
        return [*alone, *ladder, *({**point, STEPS: middle} for point in alone if middle)]

    def neighbours(self, params: Params) -> Iterator[Params]:
        """Yield the points one value away: steps and the fields of methods that are on, then a method more or less."""
        active = {params[_slot(i)] for i in range(len(self.slots))} - {OFF}
        for key, size in [(STEPS, len(self.steps)), *((key, len(values)) for key, values in self.fields.items())]:
            if key == STEPS or key.partition(".")[0] in active:
                yield from ({**params, key: i} for i in (params[key] - 1, params[key] + 1) if 0 <= i < size)

    def exchanges(self, params: Params) -> Iterator[Params]:
        """Yield the points with one slot's method off, on or another."""
        for i, names in enumerate(self.slots):
            yield from ({**params, _slot(i): name} for name in (OFF, *names) if name != params[_slot(i)])


def registered(names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the config classes that a tuner may use, by name.

    Args:
        names: methods to use, tunable fields or not. None takes every registered one that says what may be tuned, and
            every sampler that is neither a search, nor for several prompts, nor the stock loop's own rule: its steps
            may be tuned.

    Raises:
        DiffAccelError: for an unknown name, and a search, whose pictures are others by intention.
    """
    known = registry.names()
    for name in names or ():
        if name not in known:
            raise unknown("method", name, known)
        if getattr(registry.config_class(name), "searches", False):
            raise DiffAccelError(f"'{name}' is a search: it buys better pictures with time. Leave it out of --methods.")
    classes = {}
    for name in known if names is None else names:
        try:
            config_class = registry.config_class(name)
        except DiffAccelError:
            if names is not None:
                raise
            continue  # a plugin that cannot be imported
        if names is not None or _fits(config_class):
            classes[name] = config_class
    return classes


def _fits(config_class: Any) -> bool:
    if getattr(config_class, "searches", False) or not hasattr(config_class, "tunable"):
        return False
    if getattr(config_class, "composes", False):  # several prompts in one picture: others by intention
        return False
    is_sampler = config_class.touches == "loop" and not getattr(config_class, "is_stock_rule", False)
    needs_nothing = all(f.default is not f.default_factory for f in fields(config_class))
    return needs_nothing and (bool(config_class.tunable()) or is_sampler)


def step_numbers(steps: int) -> tuple[int, ...]:
    """Return numbers of steps from ``steps`` down to a quarter of it, at most 12 of them, in even ratios."""
    least = max(1, steps // 4)
    numbers = list(range(steps, least - 1, -1))
    if len(numbers) <= MOST_STEPS:
        return tuple(numbers)
    ratio = (least / steps) ** (1 / (MOST_STEPS - 1))
    return tuple(dict.fromkeys(round(steps * ratio**i) for i in range(MOST_STEPS)))


def _slots(methods: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return methods in groups within which each excludes each: a method joins the first group that it fits."""
    groups: list[list[str]] = []
    for name, config_class in methods.items():
        group = next((g for g in groups if all(_excludes(config_class, methods[other]) for other in g)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return tuple(map(tuple, groups))


def _excludes(first: Any, second: Any) -> bool:
    named = second.name in first.conflicts or first.name in second.conflicts
    return named or first.touches == second.touches == "loop"


def _slot(number: int) -> str:
    return f"slot {number}"


def _spread(count: int) -> list[int]:
    """Return up to 6 places of ``count``, the first one left out, spread evenly."""
    return sorted({round(i * (count - 1) / 6) for i in range(1, 7)} - {0})

"""Configs: frozen keyword-only dataclasses that validate themselves and round-trip through plain dicts."""

from __future__ import annotations

import math
import sys
import types
import typing
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from diffaccel.errors import DiffAccelError, shortened, unknown

if TYPE_CHECKING:
    from diffaccel.session import Sampling, Session

Touches = Literal["weights", "blocks", "loop", "graphs"]
ORDER: tuple[Touches, ...] = ("weights", "blocks", "loop", "graphs")
State = Literal["float32", "stock"]
Level = Literal["fast", "slow", "unsupported", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Abilities of a machine as measured by ``diffaccel doctor``, for a method's :meth:`Config.support`.

    Attributes:
        device: "cuda", "mps" or "cpu", the best that works.
        capability: compute capability of a CUDA device, such as (9, 0).
        memory: memory of the device in bytes.
        attention: names of the attention backends that work, as ``diffaccel doctor`` lists them.
        dtypes: names of the dtypes whose matrix products work.
        triton: whether Triton can be imported and a device is present that it compiles for.
        compiles: whether ``torch.compile`` works; None when that was not tried (``doctor --compile``).
    """

    device: str
    capability: tuple[int, int] | None = None
    memory: int = 0
    attention: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    triton: bool = False
    compiles: bool | None = None


@runtime_checkable
class Handle(Protocol):
    """Undoes a weight or block method that was applied to a network."""

    def remove(self) -> None:
        """Restore the network to the bit.

        A handle may also have ``report()``, JSON-ready: what the method did, for summaries and records.
        """


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every method's config.

    Fields are checked against their types. Numbers are finite in every field: records are JSON, which has neither
    infinity nor not-a-number, so a field without a limit takes None or a number that stands for it.

    Class attributes:
        name: the registry name, also the prefix of command line options.
        touches: the part that the method changes; ``accelerate`` applies weights, then blocks, then the loop, and last
            what records the result as graphs.
        conflicts: names of methods that cannot be active at the same time.
        citation: title and arXiv id.
        command: a shell command that shows the method, where ``diffaccel sample`` does not.
        added: names of options that came after the first records; their defaults are what was done before.
        needs_steps: whether a method on the network must be told the step of every network call. Without a loop method
            the call then runs under the pipeline's own scheduler, step by step.
        watches_calls: whether the handle of a method on the network has ``during(pipe, label)``, a context manager that
            is entered around every pipeline call; ``label`` names the loop.
    """

    name: ClassVar[str]
    touches: ClassVar[Touches]
    conflicts: ClassVar[tuple[str, ...]] = ()
    citation: ClassVar[str] = ""
    command: ClassVar[str] = ""
    added: ClassVar[tuple[str, ...]] = ()
    needs_steps: ClassVar[bool] = False
    watches_calls: ClassVar[bool] = False

    @property
    def rows_apart(self) -> bool:
        """Whether what a method on the network does to a row depends on that row alone."""
        return False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            finite, fits = _is_finite(value), _fits(value, hints[field.name])
            if not finite or not fits:
                finite = finite and not _spells_infinite(value)
                kind = _describe(hints[field.name]) + ("" if finite else ", and finite")
                raise DiffAccelError(
                    f"{type(self).__name__}.{field.name} is {shortened(repr(value), 100)}; it must be {kind}."
                    + _advice(value, hints[field.name])
                )
        self.validate()

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields for copies and pickles; what calls cache beside them, such as networks, stays behind."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def validate(self) -> None:
        """Raise :class:`DiffAccelError` for values that do not fit together; types were checked already."""

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        """Return the fields that a tuner may change: for each its values, in the order of growing speed."""
        return {}

    @classmethod
    def ways(cls) -> tuple[Self, ...]:
        """Return the configs that a report on all methods compares: the default one, or one for each kind."""
        return (cls(),)

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return how well the method runs on a machine, and why: on its fast path, on a slower one, or not at all."""
        return "unknown", "the method does not say what it needs"

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name": ..., field: value}``, JSON-ready.

        An option that is younger than the first records is left out where it has its default: what earlier versions
        did, so that their records still name the same settings.
        """
        defaults = {field.name: field.default for field in fields(self) if field.name in self.added}
        values = {name: value for name, value in asdict(self).items() if defaults.get(name, MISSING) != value}
        return {"name": self.name, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Invert :meth:`to_dict`, also after JSON; an unknown key raises with the nearest match."""
        if values.get("name", cls.name) != cls.name:
            raise DiffAccelError(f"These are options of '{values['name']}', not of '{cls.name}' ({cls.__name__}).")
        options = {k: v for k, v in values.items() if k != "name"}
        hints = typing.get_type_hints(cls)
        names = [f.name for f in fields(cls)]
        for key, value in options.items():
            if key not in names:
                raise unknown(f"option of {cls.__name__}", key, names)
            if isinstance(value, list) and not _fits(value, hints[key]) and _fits(tuple(value), hints[key]):
                options[key] = tuple(value)  # JSON has no tuples
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in required if name not in options]
        if missing:
            raise DiffAccelError(f"{cls.__name__} needs {', '.join(missing)}; got {', '.join(options) or 'nothing'}.")
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Config):
    """Base of sampler configs.

    Args:
        state: keep latents in fp32 between steps ("float32"), or round them to the pipeline's dtype after every step
            as the stock loop does ("stock"). Schedulers of diffusers begin every step at fp32, also in a pipeline of
            float64; so does "stock", and not "float32", which keeps float64 there.
        max_batch: maximum number of rows in one network call; 0 for no limit.
        guidance_stop: share of the steps after which only the conditional prediction is made: 0.82 saves the
            unconditional one in the last 18 %. 1 never stops, and equals the call without it to the bit. Guidance that
            the network embeds, as FLUX's, costs nothing and stays.
    """

    touches: ClassVar[Touches] = "loop"
    evals_per_step: ClassVar[int] = 1
    searches: ClassVar[bool] = False  # one call may use many processes, and writes files of its own
    leaves_files: ClassVar[bool] = False  # writes files of its own, without being a search
    composes: ClassVar[bool] = False  # takes several pipelines, as a list
    separator: ClassVar[str] = ""  # joins several prompts of a command to the components of one picture
    added: ClassVar[tuple[str, ...]] = ("guidance_stop",)
    is_stock_rule: ClassVar[bool] = False  # its result is the stock call's, which is made where it is not followed
    keeps_rows: ClassVar[bool] = True  # the rows of its network calls are those of the step before, one by one

    state: State = "float32"
    max_batch: int = 0
    guidance_stop: float = 1.0

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast": arithmetic between predictions runs on every machine."""
        predictions = "one prediction" if cls.evals_per_step == 1 else f"{cls.evals_per_step} predictions"
        return "fast", f"works everywhere: time follows NFE, {predictions} a step"

    def sample(self, session: Session) -> Sampling:
        """Return the sampler's generator for one session."""
        raise NotImplementedError

    def validate(self) -> None:
        if self.max_batch < 0:
            raise DiffAccelError(
                f"{type(self).__name__}.max_batch is {self.max_batch}; it must be 0 (no limit) or more."
            )
        if not 0 <= self.guidance_stop <= 1:
            raise DiffAccelError(
                f"{type(self).__name__}.guidance_stop is {self.guidance_stop}; it must be from 0 (no guidance) to 1 "
                "(all steps)."
            )


class ModuleConfig(Protocol):
    """The interface of a config that acts on the network itself."""

    name: str
    touches: Touches
    conflicts: tuple[str, ...]

    def apply(self, pipe: Any) -> Handle:
        """Change the pipeline's network and return the handle that undoes it."""


def _is_finite(value: Any) -> bool:
    """Return whether a value, and all that is in it, is neither infinite nor not-a-number."""
    if isinstance(value, tuple | list):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def _spells_infinite(value: Any) -> bool:
    """Return whether a text, as a shell gives it, is of a number that is not finite."""
    try:
        return isinstance(value, str) and not math.isfinite(float(value))
    except ValueError:
        return False


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_fits(v, args[0]) for v in value)
        return len(args) == len(value) and all(_fits(v, a) for v, a in zip(value, args, strict=True))
    if origin is not None:
        return isinstance(value, origin) if isinstance(origin, type) else True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) else True


def _advice(value: Any, hint: Any) -> str:
    """Return how a command writes the list that a text stands for; "" where no list is asked for."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    tuples = [option for option in options if typing.get_origin(option) is tuple]
    if not isinstance(value, str) or not tuples:
        return ""
    example = '["10", "01"]' if str in typing.get_args(tuples[0]) else "[1, 2]"
    return f" Write a list in brackets, and in a shell in quotes: '{example}'."


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    if any(typing.get_origin(option) is Literal for option in options):
        return " or ".join(_describe(option) for option in options if option is not type(None)) + ", or None"
    return str(hint).replace("typing.", "") if typing.get_args(hint) else str(getattr(hint, "__name__", hint))

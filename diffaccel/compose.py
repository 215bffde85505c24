"""``accelerate``, ``remove``, ``summary``: methods on a pipeline, and off it again.

A loop method changes only the class of the pipeline instance, to a subclass of the same name whose ``__call__`` runs
the stock call around the method's own loop. Weight and block methods change the network and return a handle.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffaccel import registry
from diffaccel.config import ORDER, Handle, SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.modules.call_class import facts_of, put_on, stock_class, take_off
from diffaccel.modules.guard import alone

OnBusy = Literal["wait", "refuse"]
_KEY = "_diffaccel"
_EXTRAS: ContextVar[tuple[Any, Path | None, bool] | None] = ContextVar("diffaccel_call_extras", default=None)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Applied:
    """A method on a network. Pipelines that share the network (``copy.copy``) share this, too.

    Attributes:
        handle: what takes it off; None before it is on and after it is off.
    """

    config: Any
    handle: Handle | None = None

    def remove(self) -> None:
        """Take the method off, unless that is done."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Applied:
        """Copy with the network, where the handle is a value and not bound to this very network."""
        if self.handle is not None and not _is_value(self.handle):
            raise DiffAccelError(
                f"'{self.config.name}' is on a network of this pipeline in a way that a copy could not be freed of: "
                f"its {type(self.handle).__name__} keeps functions. diffaccel.remove(pipe), copy, and accelerate both."
            )
        return Applied(self.config, copy.deepcopy(self.handle, memo))


@dataclass(frozen=True, eq=False)
class Active:
    """State of the methods on one pipeline. It is replaced and never changed, so that copies may share it.

    Attributes:
        original_class: the pipeline's class before :func:`accelerate`.
        applied: the methods on its networks, in the order in which they were applied.
        loop: the method that owns the sampling loop.
        stats: cost of the last run.
        on_busy: what a call does while another thread makes one.
        announced: what was made of the pipeline without its methods, and logged.
    """

    original_class: type
    applied: tuple[Applied, ...] = ()
    loop: SamplerConfig | None = None
    stats: Any = None
    on_busy: OnBusy = "wait"
    announced: tuple[str, ...] = ()

    @property
    def configs(self) -> list[Any]:
        """Configs of the active methods, weights first, then blocks, then the loop."""
        on_networks = [applied.config for applied in self.applied if applied.handle is not None]
        configs = on_networks if self.loop is None else [*on_networks, self.loop]
        return sorted(configs, key=lambda config: ORDER.index(config.touches))

    @property
    def told(self) -> tuple[str, ...]:
        """Names of the methods on the networks that must be told the step of every network call."""
        return tuple(config.name for config in self.configs if _needs_steps(config))

    @property
    def owns_calls(self) -> bool:
        """Whether calls of the pipeline are made here: by a loop method, or step by step for a method that is told."""
        return self.loop is not None or bool(self.told)

    @property
    def driver(self) -> Any:
        """The loop method, or the pipeline's own rule where a method on a network needs steps and there is no loop."""
        if self.loop is None and self.told:
            return registry.config_class("scheduler")()
        return self.loop


def _needs_steps(config: Any) -> bool:
    return bool(getattr(config, "needs_steps", False))


def active(pipe: Any) -> Active | None:
    """Return the state of the methods on ``pipe``, or None."""
    return pipe.__dict__.get(_KEY)


def accelerate(pipe: Any, *configs: Any, on_busy: OnBusy | None = None) -> Any:
    """Apply methods to a diffusers pipeline, in place, and return the same object.

    Methods are applied weights first, then blocks, then the loop, whatever their order here; the pipeline's call keeps
    its signature. More methods can be added later by another call.

    A cache is told the step of every network call. Without a loop method its calls run under the rule of the pipeline's
    own scheduler ('scheduler'), which equals the stock loop to the bit; one that cannot be followed so raises.

    Args:
        pipe: a diffusers pipeline, or a list of them for a method that composes several (the first is returned).
        configs: config objects, or names of methods with their default config.
        on_busy: what a call does while another thread calls the pipeline, or one with the same scheduler: "wait", the
            default, or "refuse" with an error that leaves the other call alone. None keeps what was said before.

    Raises:
        DiffAccelError: for an unknown name, two methods that exclude each other, or a pipeline that cannot be followed.
    """
    if isinstance(pipe, list | tuple):
        raise DiffAccelError(
            f"Got a list of {len(pipe)} pipelines, and none of the methods composes several. Pass one pipeline."
        )
    _check_pipeline(pipe)
    if not configs:
        raise DiffAccelError(f"accelerate needs at least one method. Known: {', '.join(sorted(registry.names()))}.")
    new_configs = [_config(config) for config in configs]
    if on_busy not in (None, "wait", "refuse"):
        raise DiffAccelError(f"on_busy is {on_busy!r}; it must be 'wait' or 'refuse'.")
    alone(pipe, lambda: _add(pipe, new_configs, on_busy))
    return pipe


def _add(pipe: Any, new_configs: list[Any], on_busy: OnBusy | None) -> None:
    """Apply methods to a pipeline that nobody calls; without one that fails, the pipeline is as it was."""
    before = active(pipe)
    _check_clashes([*(before.configs if before else []), *new_configs])
    try:
        if before is None:
            take_off(pipe)
            _set(pipe, Active(stock_class(type(pipe))))
        for config in sorted(new_configs, key=lambda config: ORDER.index(config.touches)):
            if (config.touches == "loop" or _needs_steps(config)) and not _state(pipe).owns_calls:
                put_on(pipe, _call, _tell, _KEY)
            if config.touches == "loop":
                _update(pipe, loop=config)
            else:
                applied = Applied(config)
                _update(pipe, applied=(*_state(pipe).applied, applied))
                applied.handle = config.apply(pipe)
        _update(pipe, on_busy=on_busy or _state(pipe).on_busy)
    except BaseException:  # also an interrupt
        _take_off(pipe, before)
        raise


def remove(pipe: Any) -> Any:
    """Take every method off a pipeline again; it then computes what it computed before, to the bit.

    A call that another thread makes is waited for, and what an interrupted call left on the pipeline is put back. A
    pipeline without methods is returned unchanged. What others have done to the pipeline in the meantime stays.
    """
    if active(pipe) is not None or facts_of(type(pipe)) is not None:
        alone(pipe, lambda: _take_off(pipe, None))
    return pipe


def _take_off(pipe: Any, before: Active | None) -> None:
    """Take off the methods that ``before`` does not have, the latest first; each stays noted until it is off."""
    state = active(pipe)
    kept = before.applied if before else ()
    for applied in reversed(state.applied if state else ()):
        if applied not in kept:
            applied.remove()
    _set(pipe, before)
    if before is None or not before.owns_calls:  # without a state the class passes calls on, should this be interrupted
        take_off(pipe)


def _state(pipe: Any) -> Active:
    return pipe.__dict__[_KEY]


def _set(pipe: Any, state: Active | None) -> None:
    if state is None:
        pipe.__dict__.pop(_KEY, None)
    else:
        pipe.__dict__[_KEY] = state


def _update(pipe: Any, **changes: Any) -> None:
    _set(pipe, replace(_state(pipe), **changes))


def _is_value(handle: Any) -> bool:
    """Return whether a handle is data: of a class that can be found by its name, without functions in it."""
    cls = type(handle)
    named: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        named = getattr(named, part, None)
    return named is cls and not any(map(inspect.isroutine, getattr(handle, "__dict__", {}).values()))


@dataclass
class Summary:
    """The active methods of a pipeline and the cost of its last run; prints as a table."""

    pipeline: str
    methods: list[dict[str, Any]]
    last_run: dict[str, Any] | None
    implied: str | None = None  # name of the loop that runs because a method needs steps and none was given

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for records."""
        return {"pipeline": self.pipeline, "methods": self.methods, "last_run": self.last_run, "implied": self.implied}

    def __str__(self) -> str:
        lines = [self.pipeline]
        for method in self.methods:
            options = ", ".join(f"{k}={v}" for k, v in method.items() if k not in ("name", "touches"))
            lines.append(f"  {method['name']:<12}{method['touches']:<9}{options}")
        if self.implied:
            lines.append(f"  {self.implied:<12}{'loop':<9}the pipeline's own steps, which tell a cache where it is")
        if not self.methods:
            lines.append("  no methods active")
        if self.last_run:
            run = self.last_run
            cost = f"  last run    {run['steps']} steps, {run['nfe']} NFE, {run['forwards']} forward rows, "
            cost += f"{run['seconds']:.2f} s"
            if run["peak_memory"]:
                cost += f", peak {run['peak_memory'] / 2**30:.2f} GiB"
            lines.append(cost)
            if caches := run.get("caches"):
                calls = caches["real_calls"] + caches["skipped_calls"]
                share = f"{caches['skipped_share_of_seconds']:.1%} of their seconds"
                lines.append(f"  caches      {caches['skipped_calls']} of {calls} network calls skipped, {share}")
        return "\n".join(lines)


def summary(pipe: Any) -> Summary:
    """Return the active methods of ``pipe`` and the cost of its last run."""
    _check_pipeline(pipe)
    state = active(pipe)
    cls = state.original_class if state else type(pipe)
    methods = [{**c.to_dict(), "touches": c.touches} for c in state.configs] if state else []
    last = state.stats.to_dict() if state and state.stats else None
    implied = state.driver.name if state and state.loop is None and state.told else None
    return Summary(cls.__name__, methods, last, implied)


def _config(config: Any) -> Any:
    if isinstance(config, str):
        return registry.config_class(config)()
    if isinstance(config, type):
        raise DiffAccelError(f"Got the class {config.__name__}; pass an instance: {config.__name__}().")
    if getattr(config, "touches", None) not in ORDER:
        raise DiffAccelError(
            f"Got {type(config).__name__}, which is no config of a method. Pass a config, or one of the names: "
            f"{', '.join(sorted(registry.names()))}."
        )
    return config


def _check_pipeline(pipe: Any) -> None:
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise DiffAccelError(f"Got {type(pipe).__name__}; pass a diffusers pipeline, such as FluxPipeline.")


def _check_clashes(configs: list[Any]) -> None:
    for first, second in itertools.combinations(configs, 2):
        if first.name == second.name:
            raise DiffAccelError(
                f"'{first.name}' is already active. diffaccel.remove(pipe) first to change its options."
            )
        if _needs_steps(first) or _needs_steps(second):
            _check_trajectories(first, second)
        if second.name in first.conflicts or first.name in second.conflicts:
            raise DiffAccelError(f"'{first.name}' and '{second.name}' cannot be active together. Use one.")
        if first.touches == second.touches == "loop":
            raise DiffAccelError(
                f"'{first.name}' and '{second.name}' both replace the sampling loop. Use one of them, "
                "or diffaccel.remove(pipe) in between."
            )


def _check_trajectories(first: Any, second: Any) -> None:
    """Raise for a method that keeps what each row computed, with a loop whose rows change between steps."""
    cache, loop = (first, second) if _needs_steps(first) else (second, first)
    if not getattr(loop, "keeps_rows", True):
        raise DiffAccelError(
            f"'{cache.name}' keeps what each row of a network call computed at earlier steps, and '{loop.name}' calls "
            f"the network for other rows from step to step. Use one of them, or '{cache.name}' with 'euler'."
        )


def call(pipe: Any, arguments: dict[str, Any], *, folder: Path | None = None, shared: bool = False) -> Any:
    """Call ``pipe(**arguments)``, with what only a caller who keeps files or launches processes can say.

    Args:
        folder: where a search may leave files; None for nowhere.
        shared: whether all processes of the launch make this one call together.
    """
    token = _EXTRAS.set((pipe, folder, shared))
    try:
        return pipe(**arguments)
    finally:
        _EXTRAS.reset(token)


def _call(pipe: Any, stock_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call with the loop of the active method, after the calls of other threads."""
    extras = _EXTRAS.get()
    folder, shared = extras[1:] if extras is not None and extras[0] is pipe else (None, False)

    def generate_alone() -> Any:
        from diffaccel.runtime.call import generate

        state = active(pipe)
        if state is None or not state.owns_calls:  # another thread has removed it in between
            return stock_call(pipe, *args, **kwargs)
        driver, told = state.driver, state.told
        result, stats = generate(pipe, driver, stock_call, args, kwargs, folder=folder, shared=shared, told=told)
        if active(pipe) is not None:  # a callback may have removed it
            _update(pipe, stats=stats)
        return result

    state = active(pipe)
    if state is None:  # but somebody else has changed the class, so that it stayed
        return stock_call(pipe, *args, **kwargs)
    return alone(pipe, generate_alone, waits=state.on_busy == "wait")


def _tell(pipe: Any, what: str) -> None:
    """Log, once for each pipeline, that something is made of it without the methods of its calls."""
    state = active(pipe)
    if state is not None and state.owns_calls and what not in state.announced:
        _update(pipe, announced=(*state.announced, what))
        names = "' and '".join(state.told if state.loop is None else (*state.told, state.loop.name))
        logger.warning("%s, without '%s': call diffaccel.accelerate on that one as well.", what, names)

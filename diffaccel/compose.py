"""``accelerate``, ``remove``, ``summary``: methods on a pipeline, and off it again.

Any method changes the class of the pipeline instance, whose ``__call__`` lets one thread at a time pass. A loop method
changes no more: the stock call runs around a loop of its own. Other methods change the network and return a handle;
graphs are recorded last, and step aside for others.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel import lending, presets, registry
from diffaccel.active import (
    KEY,
    Active,
    Applied,
    OnBusy,
    Summary,
    active,
    as_loop,
    methods_on,
    needs_steps,
    put_back,
    take_graphs,
    turn_back,
    watched,
)  # fmt: skip
from diffaccel.config import ORDER
from diffaccel.errors import DiffAccelError
from diffaccel.modules.call_class import facts_of, put_on, stock_class, take_off
from diffaccel.modules.guard import alone, is_called_here
from diffaccel.presets import Preset

_EXTRAS: ContextVar[tuple[Any, Path | None, bool] | None] = ContextVar("diffaccel_call_extras", default=None)

logger = logging.getLogger(__name__)


def accelerate(pipe: Any, *configs: Any, on_busy: OnBusy | None = None) -> Any:
    """Apply methods to a diffusers pipeline, in place, and return the same object.

    Methods are applied weights first, then blocks, then the loop, and graphs last, whatever their order here; the
    pipeline's call keeps its signature. More methods can be added later by another call.

    A cache is told the step of every network call. Without a loop method its calls run under the rule of the pipeline's
    own scheduler ('scheduler'), which equals the stock loop to the bit; one that cannot be followed so raises.

    Args:
        pipe: a diffusers pipeline, or a list of them for a method that composes several: it is put on the first, which
            is returned, and asks the others, which stay as they are.
        configs: config objects, names of methods with their default config, or the file of a preset that
            ``diffaccel tune`` wrote: its default point's methods, and its number of steps where a call says none.
        on_busy: what a call does while another thread calls the pipeline, or one with the same scheduler: "wait", the
            default, or "refuse" with an error that leaves the other call alone. None keeps what was said before.

    Raises:
        DiffAccelError: for an unknown name, two methods that exclude each other, or a pipeline that cannot be followed.
    """
    if isinstance(pipe, list | tuple):
        return _accelerate_together(list(pipe), [_config(config) for config in configs], on_busy)
    _check_pipeline(pipe)
    if not configs:
        raise DiffAccelError(f"accelerate needs at least one method. Known: {', '.join(sorted(registry.names()))}.")
    preset = _preset(pipe, configs)
    own = () if preset is None else preset.point().methods
    new_configs = [*own, *(_config(config) for config in configs if not presets.is_preset(config))]
    if on_busy not in (None, "wait", "refuse"):
        raise DiffAccelError(f"on_busy is {on_busy!r}; it must be 'wait' or 'refuse'.")
    alone(pipe, lambda: _add(pipe, new_configs, on_busy, preset))
    return pipe


def _accelerate_together(pipes: list[Any], configs: list[Any], on_busy: OnBusy | None) -> Any:
    """Put a loop that composes several pipelines on the first of them; the others are asked, and stay as they are."""
    for pipe in pipes:
        _check_pipeline(pipe)
    if not any(getattr(config, "composes", False) for config in configs):
        raise DiffAccelError(
            f"Got a list of {len(pipes)} pipelines, and none of the methods composes several. Pass one pipeline."
        )
    if len(configs) != 1:
        names = "' and '".join(config.name for config in configs)
        raise DiffAccelError(
            f"Got a list of {len(pipes)} pipelines and '{names}'. A list takes the one method that composes them; put "
            "others on each pipeline by a call of its own before."
        )
    if len(pipes) < 2:
        raise DiffAccelError(f"Got a list of {len(pipes)} pipelines. Pass two or more, or the pipeline by itself.")
    configs[0].check_pipelines(pipes)
    for pipe in pipes:
        _check_composed(configs[0], active(pipe))
    first, partners = pipes[0], tuple(pipes[1:])

    def add() -> None:
        before = active(first)
        _add(first, configs, on_busy, None)
        try:
            _update(first, partners=partners)
        except BaseException:
            _take_off(first, before)
            raise

    alone(first, add)
    return first


def _check_composed(config: Any, state: Active | None) -> None:
    """Raise for a cache on a pipeline that is composed with others, whose networks take turns in every step."""
    if state is not None and state.told:
        raise _keeps_steps(state.told[0], config)


def _keeps_steps(cache: str, loop: Any) -> DiffAccelError:
    return DiffAccelError(
        f"'{cache}' keeps what a network computed at earlier steps, and '{loop.name}' asks several networks in turns. "
        "Use one of them: diffaccel.remove(pipe) first."
    )


def _preset(pipe: Any, configs: tuple[Any, ...]) -> Preset | None:
    """Return the preset among the arguments, which fits the pipeline; None where there is none."""
    read = [presets.read(config) for config in configs if presets.is_preset(config)]
    if len(read) > 1:
        raise DiffAccelError(f"Got {len(read)} presets, '{read[0].source}' and '{read[1].source}'. Use one.")
    for preset in read:
        preset.check(pipe)
        if (state := active(pipe)) is not None and state.preset is not None:
            raise DiffAccelError(
                f"The preset '{state.preset.source}' is already active. Switch with diffaccel.set_quality(pipe, NAME), "
                "or diffaccel.remove(pipe) first."
            )
    return read[0] if read else None


def set_quality(pipe: Any, name: str) -> Any:
    """Switch a pipeline to another point of its preset, and return the same object.

    Only the methods that differ are taken off and put on. A call that another thread makes is waited for and keeps the
    point that it began with; later calls have the new one.

    Args:
        pipe: to which ``accelerate(pipe, "preset.json")`` was applied.
        name: of the point, such as "balanced"; "baseline" for the plain pipeline's own steps and loop.

    Raises:
        DiffAccelError: for a pipeline without a preset, an unknown name, points that differ on the weights, and in a
            callback of the pipeline's running call.
    """
    _check_pipeline(pipe)
    if not isinstance(name, str):
        raise DiffAccelError(f"set_quality got {name!r}; give the name of a point, such as 'balanced'.")
    if is_called_here(pipe):
        raise DiffAccelError(
            f"set_quality(pipe, '{name}') was called inside a running call of {type(pipe).__name__}, which keeps the "
            "point that it began with. Call it when that call has ended."
        )
    alone(pipe, lambda: _switch(pipe, name))
    return pipe


def _switch(pipe: Any, name: str) -> None:
    before = active(pipe)
    if before is None or before.preset is None or before.point is None:
        raise DiffAccelError("The pipeline has no preset. Call diffaccel.accelerate(pipe, 'preset.json') first.")
    point = before.preset.point(name)
    leaving = [config for config in before.point.methods if config not in point.methods]
    coming = [config for config in point.methods if config not in before.point.methods]
    if weights := [config for config in (*leaving, *coming) if config.touches == "weights"]:
        raise DiffAccelError(
            f"'{before.point.name}' and '{name}' differ in '{weights[0].name}', which changes weights. "
            f"diffaccel.remove(pipe), and accelerate with another preset."
        )
    kept = tuple(applied for applied in before.applied if applied.config not in leaving)
    was_on = methods_on(before)
    try:
        aside = take_graphs(kept if any(config.touches != "loop" for config in leaving) else ())
        for applied in reversed(before.applied):
            if applied not in kept:
                applied.remove()
        loop = None if before.loop in leaving else before.loop
        _update(pipe, applied=kept, loop=loop, point=point)
        _add(pipe, coming, None, None)
        put_back(pipe, aside)
    except BaseException:  # nothing half-done: what was on before is put on again, and nothing else
        turn_back(pipe, _state(pipe), was_on, leaving)
        _set(pipe, before)
        raise


def _add(pipe: Any, new_configs: list[Any], on_busy: OnBusy | None, preset: Preset | None) -> None:
    """Apply methods to a pipeline that nobody calls; without one that fails, the pipeline is as it was."""
    before = active(pipe)
    _check_clashes([*(before.configs if before else []), *new_configs])
    if before is not None and before.partners:
        for config in filter(needs_steps, new_configs):
            raise _keeps_steps(config.name, before.loop)
    on_network = [config for config in new_configs if config.touches not in ("loop", "graphs")]
    was_on = methods_on(before)
    try:
        aside = take_graphs(before.applied if before and on_network else ())
        _add_in_order(pipe, new_configs, on_busy, preset, before)
        put_back(pipe, aside)
    except BaseException:
        _take_off(pipe, before)
        turn_back(pipe, before, was_on, [])
        raise


def _add_in_order(
    pipe: Any, new_configs: list[Any], on_busy: OnBusy | None, preset: Preset | None, before: Active | None
) -> None:
    try:
        if before is None:
            take_off(pipe)
            _set(pipe, Active(stock_class(type(pipe))))
            put_on(pipe, _call, _tell, KEY)  # for any method: its calls take turns
        for config in sorted(new_configs, key=lambda config: ORDER.index(config.touches)):
            if config.touches == "loop":
                _update(pipe, loop=as_loop(pipe, config))
            else:
                applied = Applied(config)
                _update(pipe, applied=(*_state(pipe).applied, applied))
                applied.handle = config.apply(pipe)
        if preset is not None:
            _update(pipe, preset=preset, point=preset.point())
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
    leaving = [applied for applied in reversed(state.applied if state else ()) if applied not in kept]
    for applied in sorted(leaving, key=lambda applied: applied.config.touches != "graphs"):
        applied.remove()
    _set(pipe, before)
    if before is None:  # without a state the class passes calls on, should this be interrupted
        take_off(pipe)


def _state(pipe: Any) -> Active:
    return pipe.__dict__[KEY]


def _set(pipe: Any, state: Active | None) -> None:
    if state is None:
        pipe.__dict__.pop(KEY, None)
    else:
        pipe.__dict__[KEY] = state


def _update(pipe: Any, **changes: Any) -> None:
    _set(pipe, replace(_state(pipe), **changes))


def summary(pipe: Any) -> Summary:
    """Return the active methods of ``pipe`` and the cost of its last run."""
    _check_pipeline(pipe)
    state = active(pipe)
    cls = state.original_class if state else type(pipe)
    methods = [{**c.to_dict(), "touches": c.touches} for c in state.configs] if state else []
    last = state.stats.to_dict() if state and state.stats else None
    implied = state.driver.name if state and state.loop is None and state.told else None
    preset = None
    if state is not None and state.preset is not None and state.point is not None:
        preset = {"source": state.preset.source, "quality": state.point.name, "call": dict(state.point.call)}
    reports = {applied.config.name: applied.report() for applied in state.applied} if state else {}
    told = {name: report for name, report in reports.items() if report is not None}
    return Summary(cls.__name__, methods, last, implied, preset, told)


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
        if needs_steps(first) or needs_steps(second):
            _check_trajectories(first, second)
        if second.name in first.conflicts or first.name in second.conflicts:
            raise DiffAccelError(f"'{first.name}' and '{second.name}' cannot be active together. Use one.")
        if first.touches == second.touches == "loop":
            raise DiffAccelError(
                f"'{first.name}' and '{second.name}' both replace the sampling loop. Use one of them, "
                "or diffaccel.remove(pipe) in between."
            )


def _check_trajectories(first: Any, second: Any) -> None:
    """Raise for a method that keeps what each row computed, with a loop whose rows change or that compares rows."""
    cache, loop = (first, second) if needs_steps(first) else (second, first)
    if not getattr(loop, "keeps_rows", True):
        raise DiffAccelError(
            f"'{cache.name}' keeps what each row of a network call computed at earlier steps, and '{loop.name}' calls "
            f"the network for other rows from step to step. Use one of them, or '{cache.name}' with 'euler'."
        )
    if getattr(loop, "searches", False) and not getattr(cache, "rows_apart", False):
        raise DiffAccelError(
            f"'{cache.name}' decides for all rows of a network call together, so that a sample of '{loop.name}' would "
            "depend on those beside it. Use 'spectrum' or 'taylorseer', or a cache with real_steps chosen beforehand."
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
        named = kwargs if state is None or state.point is None else state.point.fill_in(stock_call, args, kwargs)
        if state is None or not (state.loop or state.told):  # another thread may have removed it in between
            with watched(pipe, state):
                return stock_call(pipe, *args, **named)
        driver, told = state.driver, state.told
        beside = tuple(config.to_dict() for config in state.configs if needs_steps(config))
        with watched(pipe, state):
            result, stats = generate(
                pipe, driver, stock_call, args, named, folder=folder, shared=shared, told=told, beside=beside,
                partners=state.partners, lender=lending.Lending(pipe),
            )  # fmt: skip
        if active(pipe) is not None:  # a callback may have removed it
            _update(pipe, stats=stats)
        return result

    state = active(pipe)
    if state is None:  # but somebody else has changed the class, so that it stayed
        return stock_call(pipe, *args, **kwargs)
    for partner in state.partners:  # it may have been given a cache since
        _check_composed(state.loop, active(partner))
    run: Callable[[], Any] = generate_alone
    for owner in sorted((pipe, *state.partners), key=id):  # in one order everywhere, so that no two calls block
        run = functools.partial(alone, owner, run, waits=state.on_busy == "wait")
    return run()


def _tell(pipe: Any, what: str) -> None:
    """Log, once for each pipeline, that something is made of it without the methods of its calls."""
    state = active(pipe)
    if state is not None and state.owns_calls and what not in state.announced:
        _update(pipe, announced=(*state.announced, what))
        logger.warning("%s, without '%s': call diffaccel.accelerate on that one as well.", what, state.callers)

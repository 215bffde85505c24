"""``accelerate``, ``remove``, ``summary``: methods on a pipeline, and off it again.

A loop method changes only the class of the pipeline instance, to a subclass of the same name whose ``__call__`` runs
the stock call around the method's own loop. Weight and block methods change the network and return a handle.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffaccel import registry
from diffaccel.config import ORDER, Handle, SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.modules.guard import alone

_KEY = "_diffaccel"


@dataclass
class Active:
    """State of the methods on one pipeline.

    Attributes:
        original_class: the pipeline's class before :func:`accelerate`.
        configs: configs of the active methods, weights first, then blocks, then the loop.
        handles: of the methods that changed a network, in the order in which they were applied.
        stats: cost of the last run.
    """

    original_class: type
    configs: list[Any] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)
    stats: Any = None

    @property
    def loop(self) -> SamplerConfig | None:
        """The method that owns the sampling loop."""
        return next((c for c in self.configs if c.touches == "loop"), None)


def active(pipe: Any) -> Active | None:
    """Return the state of the methods on ``pipe``, or None."""
    return pipe.__dict__.get(_KEY)


def accelerate(pipe: Any, *configs: Any) -> Any:
    """Apply methods to a diffusers pipeline, in place, and return the same object.

    Methods are applied weights first, then blocks, then the loop, whatever their order here; the pipeline's call keeps
    its signature. More methods can be added later by another call.

    Args:
        pipe: a diffusers pipeline, or a list of them for a method that composes several (the first is returned).
        configs: config objects, or names of methods with their default config.

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
    alone(pipe, lambda: _add(pipe, new_configs))
    return pipe


def _add(pipe: Any, new_configs: list[Any]) -> None:
    """Apply methods to a pipeline that nobody calls; without one that fails, the pipeline is as it was."""
    state = active(pipe)
    _check_clashes([*(state.configs if state else []), *new_configs])
    state = state or Active(type(pipe))
    old_configs, old_count = list(state.configs), len(state.handles)
    object.__setattr__(pipe, _KEY, state)
    try:
        for config in sorted(new_configs, key=lambda config: ORDER.index(config.touches)):
            if config.touches == "loop":
                _wrap_call(pipe, state)
            else:
                state.handles.append(config.apply(pipe))
            state.configs.append(config)
    except BaseException:  # also an interrupt
        _remove_handles(state, old_count)
        state.configs = old_configs
        if not state.configs:
            _restore(pipe, state)
        raise
    state.configs.sort(key=lambda config: ORDER.index(config.touches))


def remove(pipe: Any) -> Any:
    """Take every method off a pipeline again; it then computes what it computed before, to the bit.

    A call that another thread makes is waited for, and what an interrupted call left on the pipeline is put back. A
    pipeline without methods is returned unchanged.
    """

    def take_off() -> None:
        state = active(pipe)
        if state is not None:
            _remove_handles(state, 0)
            _restore(pipe, state)

    if active(pipe) is not None:
        alone(pipe, take_off)
    return pipe


@dataclass
class Summary:
    """The active methods of a pipeline and the cost of its last run; prints as a table."""

    pipeline: str
    methods: list[dict[str, Any]]
    last_run: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for records."""
        return {"pipeline": self.pipeline, "methods": self.methods, "last_run": self.last_run}

    def __str__(self) -> str:
        lines = [self.pipeline]
        for method in self.methods:
            options = ", ".join(f"{k}={v}" for k, v in method.items() if k not in ("name", "touches"))
            lines.append(f"  {method['name']:<12}{method['touches']:<9}{options}")
        if not self.methods:
            lines.append("  no methods active")
        if self.last_run:
            run = self.last_run
            cost = f"  last run    {run['steps']} steps, {run['nfe']} NFE, {run['forwards']} forward rows, "
            cost += f"{run['seconds']:.2f} s"
            if run["peak_memory"]:
                cost += f", peak {run['peak_memory'] / 2**30:.2f} GiB"
            lines.append(cost)
        return "\n".join(lines)


def summary(pipe: Any) -> Summary:
    """Return the active methods of ``pipe`` and the cost of its last run."""
    _check_pipeline(pipe)
    state = active(pipe)
    cls = state.original_class if state else type(pipe)
    methods = [{**c.to_dict(), "touches": c.touches} for c in state.configs] if state else []
    last = state.stats.to_dict() if state and state.stats else None
    return Summary(cls.__name__, methods, last)


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
        if second.name in first.conflicts or first.name in second.conflicts:
            raise DiffAccelError(f"'{first.name}' and '{second.name}' cannot be active together. Use one.")
        if first.touches == second.touches == "loop":
            raise DiffAccelError(
                f"'{first.name}' and '{second.name}' both replace the sampling loop. Use one of them, "
                "or diffaccel.remove(pipe) in between."
            )


def _wrap_call(pipe: Any, state: Active) -> None:
    original = state.original_class
    stock_call = original.__call__

    @functools.wraps(stock_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, stock_call, args, kwargs, None, False)

    __call__.stock_call = stock_call  # type: ignore[attr-defined]
    members = {"__call__": __call__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    object.__setattr__(pipe, "__class__", type(original.__name__, (original,), members))


def call(pipe: Any, arguments: dict[str, Any], *, folder: Path | None = None, shared: bool = False) -> Any:
    """Call ``pipe(**arguments)``, with what only a caller who keeps files or launches processes can say.

    Args:
        folder: where a search may leave files; None for nowhere.
        shared: whether all processes of the launch make this one call together.
    """
    state = active(pipe)
    if state is None or state.loop is None:
        return pipe(**arguments)
    return _call(pipe, state.original_class.__call__, (), arguments, folder, shared)


def _call(
    pipe: Any,
    stock_call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    folder: Path | None,
    shared: bool,
) -> Any:
    """Make a call with the loop of the active method, after the calls of other threads."""

    def generate_alone() -> Any:
        from diffaccel.runtime.call import generate

        state = active(pipe)
        if state is None or state.loop is None:  # another thread has removed it in between
            return stock_call(pipe, *args, **kwargs)
        result, state.stats = generate(pipe, state.loop, stock_call, args, kwargs, folder=folder, shared=shared)
        return result

    return alone(pipe, generate_alone)


def _remove_handles(state: Active, start: int) -> None:
    """Undo the methods from number ``start``, the latest first; each stays noted until it is undone."""
    while len(state.handles) > start:
        state.handles[-1].remove()
        state.handles.pop()


def _restore(pipe: Any, state: Active) -> None:
    object.__setattr__(pipe, "__class__", state.original_class)
    pipe.__dict__.pop(_KEY, None)

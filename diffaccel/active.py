"""Which methods are on a pipeline: its state, and the table of it that ``summary`` prints."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from diffaccel import registry
from diffaccel.config import ORDER, Handle, SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.presets import Preset, PresetPoint

OnBusy = Literal["wait", "refuse"]
KEY = "_diffaccel"


@dataclass(eq=False)
class Applied:
    """A method on a network. Pipelines that share the network (``copy.copy``) share this, too.

    Attributes:
        handle: what takes it off; None before it is on and after it is off.
    """

    config: Any
    handle: Handle | None = None

    def report(self) -> dict[str, Any] | None:
        """Return what the method says that it did, JSON-ready; None where it says nothing."""
        report = getattr(self.handle, "report", None)
        return None if report is None else report()

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

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a pickle, of a method that leaves nothing on the network which has none."""
        if not getattr(type(self.handle), "copies", True):
            raise DiffAccelError(
                f"'{self.config.name}' is on a network of this pipeline by functions that no pickle takes. "
                "diffaccel.remove(pipe), pickle it, and accelerate both."
            )
        return vars(self)


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
        preset: the preset that some of the methods are from.
        point: of the preset, whose methods are on and whose settings a call has where it says nothing else.
        partners: other pipelines that the loop composes with this one; nothing of them is changed.
    """

    original_class: type
    applied: tuple[Applied, ...] = ()
    loop: SamplerConfig | None = None
    stats: Any = None
    on_busy: OnBusy = "wait"
    announced: tuple[str, ...] = ()
    preset: Preset | None = None
    point: PresetPoint | None = None
    partners: tuple[Any, ...] = ()

    @property
    def configs(self) -> list[Any]:
        """Configs of the active methods, weights first, then blocks, then the loop, then graphs."""
        on_networks = [applied.config for applied in self.applied if applied.handle is not None]
        configs = on_networks if self.loop is None else [*on_networks, self.loop]
        return sorted(configs, key=lambda config: ORDER.index(config.touches))

    @property
    def told(self) -> tuple[str, ...]:
        """Names of the methods on the networks that must be told the step of every network call."""
        return tuple(config.name for config in self.configs if needs_steps(config))

    @property
    def watching(self) -> list[Any]:
        """Handles of the methods on the networks that are told where a pipeline call begins and ends."""
        return [
            applied.handle for applied in self.applied if applied.handle is not None and watches_calls(applied.config)
        ]

    @property
    def callers(self) -> str:
        """Names of the methods that are told of calls or make them, as within quotes."""
        of_calls = [config for config in self.configs if needs_steps(config) or watches_calls(config)]
        of_calls = [config for config in of_calls if config.touches != "loop"]
        return "' and '".join(config.name for config in (*of_calls, *([] if self.loop is None else [self.loop])))

    @property
    def owns_calls(self) -> bool:
        """Whether its calls are made here: by a loop, for a method that is told of them, or with a preset."""
        return self.loop is not None or bool(self.told) or self.preset is not None or bool(self.watching)

    @property
    def driver(self) -> Any:
        """The loop method, or the pipeline's own rule where a method on a network needs steps and there is no loop."""
        if self.loop is None and self.told:
            return registry.config_class("scheduler")()
        return self.loop


def as_loop(pipe: Any, config: Any) -> Any:
    """Return a method of the loop that a pipeline can have.

    Raises:
        DiffAccelError: for a pipeline whose class names another method for the rounds of its own (``rounds_by``).
    """
    if (other := getattr(type(pipe), "rounds_by", None)) is not None:
        raise DiffAccelError(
            f"'{config.name}' follows one sample through noise levels, and {type(pipe).__name__} draws frame after "
            f"frame. Use '{other}', or quantizers and graphs."
        )
    return config


def needs_steps(config: Any) -> bool:
    """Return whether a method on a network must be told the step of every network call."""
    return bool(getattr(config, "needs_steps", False))


def watches_calls(config: Any) -> bool:
    """Return whether a method on a network is told where a pipeline call begins and ends."""
    return bool(getattr(config, "watches_calls", False))


def take_graphs(kept: tuple[Applied, ...]) -> list[Applied]:
    """Take graphs off while methods below them come or go, and return them: they are always applied last."""
    aside = [applied for applied in kept if applied.config.touches == "graphs" and applied.handle is not None]
    for applied in aside:
        applied.remove()
    return aside


def put_back(pipe: Any, aside: list[Applied]) -> None:
    """Apply what :func:`take_graphs` took off."""
    for applied in aside:
        if applied.handle is None:
            applied.handle = applied.config.apply(pipe)


def methods_on(state: Active | None) -> list[Applied]:
    """Return the methods that are on the networks now, in the order in which they must be put on."""
    on_networks = [applied for applied in state.applied if applied.handle is not None] if state is not None else []
    return sorted(on_networks, key=lambda applied: ORDER.index(applied.config.touches))


def turn_back(pipe: Any, state: Active | None, was_on: list[Applied], leaving: list[Any]) -> None:
    """Undo a change of methods that did not come to its end, wherever it was cut off.

    A method that was being taken off is taken off whole before it is put on again, as are the graphs over it.

    Args:
        state: of the moment; its methods that were not on before go.
        was_on: what :func:`methods_on` returned before the change.
        leaving: configs that the change takes off.
    """
    for applied in reversed(state.applied if state is not None else ()):
        if applied not in was_on:
            applied.remove()
    for applied in reversed(was_on):
        if applied.config in leaving or applied.config.touches == "graphs":
            applied.remove()
    put_back(pipe, was_on)


@contextlib.contextmanager
def watched(pipe: Any, state: Active | None) -> Iterator[None]:
    """Tell the methods on the networks that watch pipeline calls that this block is one, and which loop makes it."""
    with contextlib.ExitStack() as stack:
        for handle in state.watching if state is not None else ():
            label = type(pipe).__name__ if state is None or state.driver is None else repr(state.driver)
            stack.enter_context(handle.during(pipe, label))
        yield


def active(pipe: Any) -> Active | None:
    """Return the state of the methods on ``pipe``, or None."""
    return pipe.__dict__.get(KEY)


def _is_value(handle: Any) -> bool:
    """Return whether a handle is data: of a class that can be found by its name, without functions in it.

    A handle whose class says ``copies = False`` is of a method that leaves functions on the network itself.
    """
    cls = type(handle)
    if not getattr(cls, "copies", True):
        return False
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
    preset: dict[str, Any] | None = None
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)  # by method: what it did since it was put on

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for records."""
        values = {
            "pipeline": self.pipeline,
            "methods": self.methods,
            "last_run": self.last_run,
            "implied": self.implied,
        }
        values |= {} if self.preset is None else {"preset": self.preset}
        return {**values, **({"reports": self.reports} if self.reports else {})}

    def __str__(self) -> str:
        lines = [self.pipeline]
        if self.preset:
            settings = "".join(f", {key}={value}" for key, value in self.preset["call"].items())
            lines.append(f"  {self.preset['quality']} of {self.preset['source']}{settings}")
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
        for report in self.reports.values():
            if "graphs" in report:
                lines += _lines_of_graphs(report)
            lines += [_line_of_tables(table) for table in report.get("tables", ())]
            lines += [_line_of_rank(network) for network in report.get("low_rank", ())]
        return "\n".join(lines)


def _line_of_tables(table: dict[str, Any]) -> str:
    """Return what a report of temporal tables says of one network."""
    away, held = (f"{table[name] / 1e9:.3f} GB" for name in ("host_bytes", "table_bytes"))
    plain = "".join(f"; {count} calls without: {reason}" for reason, count in table["plain"].items())
    modules = f"{table['modules']} modules of {table['network']}"
    return f"  tables      {modules}: {away} of weights away, {table['rows']} rows in {held}{plain}"


def _line_of_rank(network: dict[str, Any]) -> str:
    """Return what a report of low-rank modulation says of one network."""
    if "ulps" not in network:
        return f"  low rank    {network['network']}: made at its first call"
    bound = f"at most {network['ulps']:.3g} bf16 ulp, {network['relative']:.2g} relative"
    return f"  low rank    {network['linears']} linears of {network['network']} at rank {network['rank']}: {bound}"


def _lines_of_graphs(report: dict[str, Any]) -> list[str]:
    """Return what a report of captured graphs says, as lines of the summary."""
    bytes_text = f"{report['bytes'] / 2**30:.2f} GiB"
    lines = [f"  graphs      {report['graphs']} in {bytes_text}, {report['replays']} replays"]
    for title, counts in (("without", report["eager_calls"]), ("given up", report["dropped"])):
        lines += [f"    {title:<10}{count}: {reason}" for reason, count in counts.items()]
    return [*lines, *(f"    note      {note}" for note in report["notes"])]

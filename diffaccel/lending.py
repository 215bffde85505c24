"""Methods that a sampler wishes on the network for a part of its call, as drafts of a search do.

The sampler yields the wish as text, ``Draft("taylorseer:interval=4")``, and never sees a method: here the registry's
names become configs, which are put on the network and taken off again.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffaccel.active import Applied, active, needs_steps, put_back, take_graphs, watches_calls
from diffaccel.config import ORDER
from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from diffaccel.session import Lent

READER = "diffaccel.runs.variant:parse"  # of the words that commands take; it lies above, so it goes by its name


class Lending:
    """Puts methods on the network of one pipeline for a part of a call, and takes them off again.

    Attributes:
        told: names of the methods put on that must be told the step of every network call.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.told: tuple[str, ...] = ()
        self._wish: tuple[str, Lent] | None = None
        self._applied: list[Applied] = []
        self._aside: list[Applied] = []
        self._watching = contextlib.ExitStack()

    def put_on(self, acceleration: str) -> Lent:
        """Put the methods of a wish on the network, in the place of those of the wish before; "" takes them off.

        Raises:
            DiffAccelError: for an unknown method or option, methods that are no acceleration of a draft, and those that
                exclude each other or what is on the pipeline.
        """
        from diffaccel.session import Lent  # which loads torch

        if self._wish is not None and acceleration == self._wish[0]:
            return self._wish[1]
        configs, steps = read(acceleration)
        self._check(configs)
        self.take_off()
        try:
            self._apply([config for config in configs if config.touches != "loop"])
        except BaseException:
            self.take_off()
            raise
        loops = [config for config in configs if config.touches == "loop"]
        self.told = tuple(config.name for config in configs if needs_steps(config))
        apart = all(getattr(config, "rows_apart", False) for config in configs if needs_steps(config))
        lent = Lent(loops[0] if loops else None, steps, apart)
        self._wish = acceleration, lent
        return lent

    def take_off(self) -> None:
        """Take off what is on; the network then computes what it computed before, to the bit."""
        self._wish, self.told = None, ()
        self._watching.close()
        while self._applied:
            self._applied[-1].remove()
            self._applied.pop()
        aside, self._aside = self._aside, []
        put_back(self.pipe, aside)

    def _apply(self, configs: list[Any]) -> None:
        state = active(self.pipe)
        if configs and state is not None:
            self._aside = take_graphs(state.applied)
        for config in sorted(configs, key=lambda config: ORDER.index(config.touches)):
            applied = Applied(config)
            self._applied.append(applied)
            applied.handle = config.apply(self.pipe)
            if watches_calls(config):
                handle: Any = applied.handle
                self._watching.enter_context(handle.during(self.pipe, "drafts"))

    def _check(self, configs: tuple[Any, ...]) -> None:
        """Raise for methods that are no part of a draft, or exclude each other or one of the pipeline's own."""
        for config in configs:
            if any(getattr(config, kind, False) for kind in ("searches", "composes", "is_stock_rule", "leaves_files")):
                raise DiffAccelError(
                    f"'{config.name}' cannot draw drafts: they are drawn by one sampler that follows the pipeline's "
                    "noise levels. Use a cache, a quantizer, 'bottleneck', another sampler, or fewer steps: "
                    "'plain:steps=4'."
                )
        state = active(self.pipe)
        own = [] if state is None else [config for config in state.configs if config.touches != "loop"]
        for number, config in enumerate(configs):
            for other in (*own, *configs[:number]):
                two_loops = config.touches == other.touches == "loop"
                clash = config.name in other.conflicts or other.name in config.conflicts
                if two_loops or clash or config.name == other.name:
                    raise DiffAccelError(
                        f"'{config.name}' of the drafts and '{other.name}' cannot be active together. Leave one out."
                    )


def read(acceleration: str) -> tuple[tuple[Any, ...], int | None]:
    """Return the configs and the number of steps that a word names, such as ``bottleneck:preset=speed,steps=12``.

    A word may stand in parentheses, as it must within another one. ``steps:12`` is short for ``plain:steps=12``.

    Raises:
        DiffAccelError: for an unknown method or option, and settings of the call other than its steps.
    """
    text = acceleration.strip()
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if text.startswith("steps:"):
        text = f"plain:steps={text.removeprefix('steps:')}"
    if not text:
        return (), None
    module, _, function = READER.partition(":")
    variant = getattr(import_module(module), function)(text)
    if others := sorted(variant.call.keys() - {"steps"}):
        raise DiffAccelError(
            f"The draft '{text}' changes {', '.join(others)} of the call, of which drafts may change the steps only."
        )
    steps = variant.call.get("steps")
    if steps is not None and steps < 1:
        raise DiffAccelError(f"The draft '{text}' has {steps} steps; it must be at least 1.")
    return variant.methods, steps

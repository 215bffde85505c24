"""The base of all step caches: options that they share, and how one is put on the networks of a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffaccel import families
from diffaccel.config import Config, Handle, Level, Machine, Touches
from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.modules.block_stack import BlockStack, OutputStack, Stacks
from diffaccel.modules.network_call import NetworkCall
from diffaccel.modules.stand_in import uncompiled
from diffaccel.modules.step_cache.cache import StepCache, Target
from diffaccel.modules.step_cache.decisions import Decision, FixedSteps, StageSteps
from diffaccel.modules.step_cache.forecasts import Chebyshev, Differences, Forecast, Last

Payload = Literal["last", "linear", "newton", "taylor", "chebyshev"]
RESIDUALS: tuple[Payload, ...] = ("last", "linear", "newton", "taylor")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Config):
    """Base of step caches: a decision which steps are real, and a payload that stands in for the others.

    All steps of a stage are counted from its beginning; both guidance branches and every chunk of rows have a history
    of their own. The rows of one network call are skipped together.

    Args:
        real_steps: numbers of the steps that are real, a pattern chosen beforehand, in the place of the method's own
            decision; None for that. A step without enough history is real anyway; one that a call does not make is an
            error. Every stage of a sampler with stages has this pattern, as far as it goes; in a list with several
            zeros each begins the next stage's, as a run's record has it.
        payload: what a skipped step returns: what the latest real step added ("last"), its extrapolation from two
            ("linear"), from ``order + 1`` real steps by the polynomial through them ("newton") or by differences
            ("taylor"), or a ridge regression over the latest ``history`` of them ("chebyshev").
        order: of "newton" and "taylor".
        history: maximum number of real steps that "chebyshev" keeps; it bounds memory.
    """

    touches: ClassVar[Touches] = "blocks"
    conflicts: ClassVar[tuple[str, ...]] = ("spectrum", "seacache", "firstblock", "taylorseer", "diffusers_cache")
    needs_steps: ClassVar[bool] = True
    probes: ClassVar[int] = 0  # first blocks that run at every step
    watches: ClassVar[bool] = False  # its decision looks at what the rows of a call compute

    real_steps: tuple[int, ...] | None = None
    payload: Payload = "last"
    order: int = 2
    history: int = 16

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast": a skipped step needs sums of tensors only."""
        return "fast", "works everywhere: a skipped step is a weighted sum of what real steps computed"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether the cache works on a pipeline, by its class name and its family or None, and why."""
        if family is None:
            return None, "works where the network is a known one and the call can be followed, as loading it shows"
        if cls.probes and family.denoiser == "unet":
            return False, f"looks at the first of a transformer's blocks, and {pipeline} has a UNet"
        return True, "forecasts the network's output" if family.denoiser == "unet" else "skips the network's blocks"

    @property
    def rows_apart(self) -> bool:
        """Whether the steps of a row depend on that row alone: by a pattern that looks at no data."""
        return not self.watches or self.real_steps is not None

    def validate(self) -> None:
        self.require(order=(1, 8), history=(2, 1000))
        if self.real_steps is not None and (not self.real_steps or min(self.real_steps) < 0):
            raise DiffAccelError(
                f"{type(self).__name__}.real_steps is {self.real_steps}; give numbers of steps from 0 on, at least one."
            )
        if self.real_steps is not None and self.real_steps.count(0) > 1 and self.real_steps[0]:
            raise DiffAccelError(
                f"{type(self).__name__}.real_steps is {self.real_steps}; each 0 begins the steps of a stage, so "
                "that it must begin with one."
            )

    def require(self, **limits: tuple[float, float]) -> None:
        """Raise for a field outside of its (least, most)."""
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise DiffAccelError(f"{type(self).__name__}.{name} is {value}; it must be from {least:g} to {most:g}.")

    def decision(self) -> Decision:
        """Return the method's own decision, fresh for one stream of calls."""
        raise NotImplementedError

    def look(self, call: NetworkCall, base: Tensor, before: Tensor | None) -> Tensor:
        """Return the indicator that the decision watches; see :class:`StepCache`."""
        raise NotImplementedError

    def forecast(self) -> Forecast:
        """Return the weights of skipped steps."""
        if self.payload == "last":
            return Last()
        if self.payload == "chebyshev":
            return Chebyshev(window=self.history)
        return Differences(1 if self.payload == "linear" else self.order, self._form())

    def _form(self) -> Any:
        return "taylor" if self.payload == "taylor" else "newton"

    def apply(self, pipe: Any) -> Handle:
        """Put the cache on every network of a pipeline.

        Raises:
            DiffAccelError: for a pipeline without a network that is known.
        """
        decide: Callable[[], Decision] = self.decision
        if self.real_steps is not None:
            decide = functools.partial(_fixed, self.real_steps)
        target: Target = "residual" if self.payload in RESIDUALS else "output"
        stacks = [self._stack(network, decide, target) for network in families.networks(pipe)]
        if not stacks:
            raise DiffAccelError(
                f"'{self.name}' found no network in {type(pipe).__name__}. Pass a pipeline with a transformer or UNet."
            )
        handle = Stacks(stacks)
        try:
            for stack in stacks:
                stack.install()
        except BaseException:
            handle.remove()
            raise
        return handle

    def _stack(self, network: Any, decide: Callable[[], Decision], target: Target) -> BlockStack:
        module = uncompiled(network)
        try:
            facts = facts_of(module)
        except DiffAccelError as error:
            raise DiffAccelError(
                f"'{self.name}' cannot skip blocks of {type(module).__name__}, which are not known here. Use fewer "
                "steps, a sampler such as 'dpmpp2m', or 'diffusers_cache' where diffusers can cache this network."
            ) from error
        if "UNet" in type(module).__name__:  # blocks that pass skips to each other are cached as one: by their output
            if self.probes and self.real_steps is None:
                raise DiffAccelError(
                    f"'{self.name}' looks at the first of a transformer's blocks, and {type(module).__name__} has "
                    "none. Use 'spectrum', 'seacache' or 'taylorseer'."
                )
            return OutputStack(StepCache(decide, self.forecast(), "output", self.look), module)
        blocks = [module.get_submodule(name) for name in facts.block_names(module)]
        if len(blocks) <= self.probes:
            raise DiffAccelError(
                f"'{self.name}' hooked no block of {type(module).__name__}: it has {len(blocks)}. Use it on a network "
                f"with more than {self.probes}."
            )
        cache = StepCache(decide, self.forecast(), target, self.look)
        return BlockStack(cache, blocks, facts.hidden_output, self.probes)


def _fixed(real_steps: tuple[int, ...]) -> Decision:
    """Return the decision of a pattern: one for all stages, or with several zeros one for each."""
    return StageSteps.of(real_steps) if real_steps.count(0) > 1 else FixedSteps(frozenset(real_steps))

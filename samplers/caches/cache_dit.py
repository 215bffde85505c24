"""The cache of the package cache-dit, where it is installed, put on and taken off as our own are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diffaccel import families
from diffaccel.config import Config, Handle, Level, Machine, Touches
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.families.facts import facts_of
from diffaccel.modules.call_class import stock_class
from diffaccel.modules.guard import attributes_of
from diffaccel.modules.stand_in import uncompiled

PACKAGE = "cache_dit"


@dataclass(frozen=True, kw_only=True)
class CacheDiT(Config):
    """``cache_dit.enable_cache`` with a ``DBCacheConfig``, for comparison: by the block residual's relative change.

    The first blocks run at every step; where ``mean|r_t - r_s| / mean|r_s| < threshold`` for their residual ``r
    (B, N, D)``, ``s`` the last real step, what the others added is taken over, or forecast by a Taylor sum. Rows decide
    together. cache-dit counts the steps of a call itself, so that it needs a sampler of one prediction a step, and
    replaces the pipeline class's ``__call__``, so that one pipeline of a class may have it at a time.

    Args:
        threshold: change below which a step is skipped; a larger one is faster, 0 makes every step real.
        first_blocks, last_blocks: numbers of blocks at both ends that run at every step.
        warmup: number of real steps at the start.
        most_skips: maximum number of skipped steps in a row; 0 for no limit.
        order: of the Taylor forecast; 0 takes the last residual.
        two_calls: a step makes two network calls, one a guidance branch, which have histories of their own; None for
            what cache-dit knows of the pipeline. FLUX with ``true_cfg_scale`` needs True.
    """

    name: ClassVar[str] = "cache_dit"
    touches: ClassVar[Touches] = "blocks"
    conflicts: ClassVar[tuple[str, ...]] = (
        "spectrum", "seacache", "firstblock", "taylorseer", "diffusers_cache", "bottleneck", "heun", "bon", "rbf",
        "smc", "svdd", "code", "sop", "drafts",
    )  # fmt: skip
    added: ClassVar[tuple[str, ...]] = ("two_calls",)
    citation: ClassVar[str] = "cache-dit, github.com/vipshop/cache-dit; TaylorSeer, arXiv 2503.06923"

    threshold: float = 0.08
    first_blocks: int = 1
    last_blocks: int = 0
    warmup: int = 8
    most_skips: int = 0
    order: int = 0
    two_calls: bool | None = None

    @classmethod
    def paper(cls) -> Self:
        """Return cache-dit's own defaults, for networks of more than eight blocks."""
        return cls(first_blocks=8)

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast" where the package is installed."""
        if importlib.util.find_spec(PACKAGE) is None:
            return "unsupported", "needs the package: pip install cache-dit"
        return "fast", "hooks of cache-dit; they wait for the device at every step"

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return whether the cache works on a pipeline, by its class name and its family or None, and why."""
        if family is not None and family.denoiser == "unet":
            return False, f"caches a transformer's blocks, and {pipeline} has a UNet"
        return None, "works on the pipelines that cache-dit knows, which putting it on shows"

    def validate(self) -> None:
        limits = {"threshold": 0, "first_blocks": 1, "last_blocks": 0, "warmup": 0, "most_skips": 0, "order": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise DiffAccelError(f"CacheDiT.{name} is {getattr(self, name)}; it must be at least {least}.")

    def apply(self, pipe: Any) -> Handle:
        """Enable the cache on a pipeline.

        Raises:
            DiffAccelError: without the package, where another pipeline of the class has it, and for a pipeline or
                options that cache-dit refuses.
        """
        self._check_blocks(pipe)
        if importlib.util.find_spec(PACKAGE) is None:
            raise DiffAccelError("'cache_dit' needs the package cache-dit. Install it: pip install cache-dit.")
        if getattr(stock_class(type(pipe)), "_is_cached", False):
            raise DiffAccelError(
                f"cache-dit is on a {type(pipe).__name__} already, and it changes the class. Take it off there first."
            )
        import cache_dit

        handle = _OnClass(pipe, cache_dit.disable_cache)
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order) if self.order else None
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.first_blocks,
            Bn_compute_blocks=self.last_blocks,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warmup,
            max_continuous_cached_steps=self.most_skips or -1,
            enable_separate_cfg=self.two_calls,
        )
        try:
            _as_stock(pipe, lambda: cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator))
        except BaseException as error:
            handle.remove()
            if isinstance(error, ValueError | TypeError | AssertionError):
                raise DiffAccelError(f"'cache_dit' was refused by cache-dit: {first_line(error)}") from error
            raise
        return handle

    def _check_blocks(self, pipe: Any) -> None:
        for network in map(uncompiled, families.networks(pipe)):
            if "UNet" in type(network).__name__:
                raise DiffAccelError(
                    f"'cache_dit' caches a transformer's blocks, and {type(network).__name__} has none. Use 'spectrum' "
                    "or 'taylorseer'."
                )
            count, always = len(facts_of(network).block_names(network)), self.first_blocks + self.last_blocks
            if count <= always:
                raise DiffAccelError(
                    f"'cache_dit' would run {always} blocks at every step, and {type(network).__name__} has {count}: "
                    "nothing would be skipped. Lower first_blocks and last_blocks."
                )


class _OnClass:
    """Takes cache-dit off a pipeline, and off its networks what it leaves there.

    That is a ``forward`` on the instance, and another order of its modules, by which a cache of diffusers would take
    a later block for the first one.
    """

    def __init__(self, pipe: Any, disable: Callable[[Any], None]) -> None:
        self.pipe, self.disable, self.is_on = pipe, disable, True
        networks = [uncompiled(network) for network in families.networks(pipe)]
        self.networks = [(network, list(network._modules)) for network in networks]
        self.restores = [attributes_of(network, ["forward"]) for network in networks]

    def remove(self) -> None:
        """Disable the cache; may be called twice."""
        if self.is_on:
            self.is_on = False
            _as_stock(self.pipe, lambda: self.disable(self.pipe))
            for restore in self.restores:
                restore()
            for network, names in self.networks:
                for name in names:  # each to the end
                    network._modules[name] = network._modules.pop(name)


def _as_stock(pipe: Any, function: Callable[[], Any]) -> None:
    """Call ``function`` while the pipeline has its stock class, whose attributes cache-dit changes and deletes."""
    own = type(pipe)
    object.__setattr__(pipe, "__class__", stock_class(own))
    try:
        function()
    finally:
        object.__setattr__(pipe, "__class__", own)

"""The caches that diffusers ships, told their step, with an error where they would do nothing or the wrong thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch

from diffaccel import families
from diffaccel.config import Config, Handle, Level, Machine, Touches
from diffaccel.errors import DiffAccelError, first_line, unknown
from diffaccel.families.facts import facts_of
from diffaccel.modules.network_call import NetworkCall, current
from diffaccel.modules.stand_in import uncompiled

Kind = Literal["first_block", "taylorseer", "mag", "sea", "pab", "faster"]
CLASSES = {
    "first_block": "FirstBlockCacheConfig", "taylorseer": "TaylorSeerCacheConfig", "mag": "MagCacheConfig",
    "sea": "SeaCacheConfig", "pab": "PyramidAttentionBroadcastConfig", "faster": "FasterCacheConfig",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DiffusersCache(Config):
    """``network.enable_cache(...)`` of diffusers, for comparison: with full context at every call, reset as ours are.

    Networks whose class has no ``enable_cache`` (SD3, PixArt, UNets) are refused, as are options that hook no module.
    What diffusers leaves to the user is filled in: the current timestep, the latents that "sea" looks at, attention
    names for "taylorseer", and the run's own number of steps for "mag". A ``threshold`` of 0 is no cache, to the bit:
    diffusers' "first_block" and "mag" would skip steps whose indicator does not change at all.

    Args:
        kind: which of them.
        options: fields of diffusers' config, such as ``{"threshold": 0.08}``. "mag" needs ``mag_ratios``, which belong
            to a checkpoint; those of FLUX.1-dev are used for a FLUX network.
    """

    name: ClassVar[str] = "diffusers_cache"
    touches: ClassVar[Touches] = "blocks"
    conflicts: ClassVar[tuple[str, ...]] = ("spectrum", "seacache", "firstblock", "taylorseer")
    citation: ClassVar[str] = "arXiv 2411.19108, 2503.06923, 2506.09045, 2602.18993, 2408.12588, 2410.19355"
    needs_steps: ClassVar[bool] = True

    kind: Kind = "first_block"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def ways(cls) -> tuple[Self, ...]:
        """Return one config for each kind."""
        return tuple(cls.from_dict({"kind": kind}) for kind in CLASSES)

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return "fast": diffusers' hooks run wherever its networks do."""
        return "fast", "hooks of diffusers; most kinds wait for the device at every step"

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"options": ({"threshold": 0.03}, {"threshold": 0.05}, {"threshold": 0.08}, {"threshold": 0.12})}

    def apply(self, pipe: Any) -> Handle:
        """Enable the cache on every network of a pipeline.

        Raises:
            DiffAccelError: for a network without caches or with one, options that diffusers refuses, and no hooks.
        """
        handle = _Enabled([])
        try:
            for network in families.networks(pipe):
                handle.caches += self._enable(pipe, uncompiled(network))
        except BaseException:
            handle.remove()
            raise
        return handle

    def _enable(self, pipe: Any, network: Any) -> list[_Cache]:
        """Return the cache of a network, or none where its threshold lets no step be skipped."""
        kind = f"'{self.name}' of the kind '{self.kind}'"
        if not hasattr(network, "enable_cache") or not hasattr(network, "cache_context"):
            raise DiffAccelError(
                f"{kind} needs a network that diffusers can cache, and {type(network).__name__} is none. Use "
                "'spectrum' or 'taylorseer'."
            )
        if network.is_cache_enabled:
            raise DiffAccelError(
                f"{type(network).__name__} has a {type(network._cache_config).__name__} already. Call its "
                "disable_cache() first."
            )
        family = families.find(pipe)
        is_distilled = self.options.get("is_guidance_distilled", False)
        if self.kind == "faster" and not is_distilled and family is not None and not family.joint_branches:
            raise DiffAccelError(
                f"{kind} takes both guidance branches in one call, and {type(pipe).__name__} makes two. Pass "
                "options={'is_guidance_distilled': True} for calls without guidance, or use another kind."
            )
        before = _hooks(network)
        try:
            config = self._diffusers_config(pipe, network)
            network.enable_cache(config)
        except DiffAccelError:  # a ValueError too, and a sentence already
            raise
        except (ValueError, TypeError) as error:
            raise DiffAccelError(f"{kind} was refused by diffusers: {first_line(error)}") from error
        except IndexError as error:  # raised while it hooks one block after the other
            raise DiffAccelError(
                f"{kind} needs more blocks than {type(network).__name__} has here. Use 'spectrum' or 'taylorseer'."
            ) from error
        if not _hooks(network) - before:
            network.disable_cache()
            raise DiffAccelError(
                f"{kind} hooked no module of {type(network).__name__}, so it would do nothing. Pass other names in "
                "options, or use 'spectrum' or 'taylorseer'."
            )
        if getattr(config, "threshold", 1.0) <= 0 and not getattr(config, "calibrate", False):
            network.disable_cache()  # all of the above holds for any threshold
            return []
        return [_Cache(network, self.kind)]

    def _diffusers_config(self, pipe: Any, network: Any) -> Any:
        import diffusers
        from diffusers.hooks import mag_cache

        cls = getattr(diffusers, CLASSES[self.kind])
        known = [name for name in cls.__dataclass_fields__ if not name.startswith("_")]
        for name in self.options:
            if name not in known:
                raise unknown(f"option of {cls.__name__}", name, known)
        values = dict(self.options)
        if self.kind in ("pab", "faster"):
            values.setdefault("current_timestep_callback", lambda: pipe.current_timestep)
        if self.kind == "taylorseer" and not {"cache_identifiers", "use_lite_mode"} & values.keys():
            values["cache_identifiers"] = [facts_of(network).attention]
        if isinstance(values.get("taylor_factors_dtype"), str):
            values["taylor_factors_dtype"] = getattr(torch, values["taylor_factors_dtype"])
        if self.kind == "sea":
            values.setdefault("raw_vision_callback", _latents_of_call)
        if self.kind == "mag" and "mag_ratios" not in values:
            if type(network).__name__ != "FluxTransformer2DModel":
                raise DiffAccelError(
                    f"'{self.name}' of the kind 'mag' needs the ratios of this checkpoint: pass options="
                    "{'mag_ratios': [...]}; diffusers has those of FLUX.1-dev only, and this is a "
                    f"{type(network).__name__}."
                )
            values["mag_ratios"] = mag_cache.FLUX_MAG_RATIOS
        return cls(**values)


class _Cache:
    """One network under a cache of diffusers: counts skipped calls, and tells "mag" the run's own number of steps."""

    def __init__(self, network: Any, kind: str) -> None:
        self.network, self.kind, self.computes = network, kind, False
        self._ratios = getattr(network._cache_config, "mag_ratios", None)
        self._context: tuple[int, str] | None = None
        queries = _queries(network, hooked=kind in ("pab", "taylorseer"))
        self._handles = [network.register_forward_pre_hook(self._begin), network.register_forward_hook(self._end)]
        self._handles += [queries[-1].register_forward_pre_hook(self._note)] if queries else []
        self._counts = bool(queries)

    def _begin(self, *_: Any) -> None:
        self.computes, call = False, current()
        config = self.network._cache_config
        if call is not None and self.kind == "pab":
            self._check_context(call)
        if call is not None and self.kind == "mag" and config.num_inference_steps != call.steps:
            from diffusers.hooks import mag_cache

            config.num_inference_steps = call.steps
            if self._ratios is not None:
                config.mag_ratios = mag_cache.nearest_interp(self._ratios, call.steps)

    def _check_context(self, call: NetworkCall) -> None:
        """Raise for a second stream of calls: this kind keeps one history for all of them."""
        trajectory, context = self._context or (call.trajectory, call.context)
        if trajectory == call.trajectory and context != call.context:
            raise DiffAccelError(
                f"'diffusers_cache' of the kind 'pab' mixes the calls '{context}' and '{call.context}' of a step: it "
                "keeps one history. Call the pipeline without guidance and with max_batch=0, or use another kind."
            )
        self._context = call.trajectory, call.context

    def _note(self, *_: Any) -> None:
        self.computes = True

    def _end(self, *_: Any) -> None:
        call = current()
        if call is not None and self._counts and not self.computes:
            call.tally.skip()

    def remove(self) -> None:
        """Disable the cache; may be called twice."""
        while self._handles:
            self._handles.pop().remove()
        if self.network.is_cache_enabled:
            self.network.disable_cache()


class _Enabled:
    """Disables the caches of all networks of a pipeline."""

    copies: ClassVar[bool] = False  # diffusers' hooks are closures over this very network: a copy would call it

    def __init__(self, caches: list[_Cache]) -> None:
        self.caches = caches

    def remove(self) -> None:
        """Disable every cache."""
        for cache in self.caches:
            cache.remove()


def _hooks(network: Any) -> set[tuple[str, str]]:
    """Return the names of diffusers' hooks and of their modules."""
    modules = [(name, getattr(module, "_diffusers_hook", None)) for name, module in network.named_modules()]
    return {(name, hook) for name, registry in modules if registry is not None for hook in registry.hooks}


def _queries(network: Any, *, hooked: bool) -> list[Any]:
    """Return the query projections, which run where attention is computed; of attention with a hook only if asked."""
    modules = dict(network.named_modules())

    def has_hooks(name: str) -> bool:
        return bool(getattr(getattr(modules[name], "_diffusers_hook", None), "hooks", ()))

    queries = {name: module for name, module in modules.items() if name.endswith(".to_q")}
    return [m for name, m in queries.items() if not hooked or has_hooks(name.rpartition(".")[0])]


def _latents_of_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
    """Return the latents of the call that is made, each ``(C, T, H, W)``, as diffusers' SeaCache looks at them."""
    call = current()
    if call is None or call.spatial is None:
        return None
    latents = call.spatial()
    return [row if row.ndim == 4 else row.unsqueeze(1) for row in latents]

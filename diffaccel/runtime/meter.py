"""A meter on a pipeline that runs its own call: what its networks and its scheduler were asked for."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from diffaccel.families.generic.stand_ins import NO_DENOISERS
from diffaccel.families.generic.values import pictures
from diffaccel.modules.guard import attributes_of
from diffaccel.modules.instance_method import InstanceMethod
from diffaccel.runtime.stats import RunPath, Stats

NO_PREDICTORS = ("controlnet", "adapter")  # parts of names of networks whose output goes into another one


def device_of(pipe: Any) -> torch.device:
    """Return the device on which a pipeline runs."""
    return torch.device(getattr(pipe, "_execution_device", "cpu"))


class Meter:
    """Counts calls of a pipeline's networks and steps of its scheduler, and changes neither.

    Networks are watched by forward hooks, the scheduler by an attribute in the place of its step.

    Args:
        path: what runs the loop. In a "stock loop" a sampler takes the scheduler's steps and counts them itself.

    Attributes:
        device: where the pipeline runs.
        stats: the account, complete after :meth:`finish`.
        calls: number of network calls by attribute name, those of ControlNets and adapters too.
    """

    def __init__(self, pipe: Any, path: RunPath) -> None:
        self.stats = Stats(path=path)
        self.device = device_of(pipe)
        self.calls: dict[str, int] = {}
        self._scheduler: Any = getattr(pipe, "scheduler", None)
        self._step = getattr(self._scheduler, "step", None) if path == "stock call" else None
        self._restore_scheduler = attributes_of(self._scheduler, ["step"]) if self._step else lambda: None
        modules = {name: vars(pipe).get(name) for name in pipe.config}
        self._networks: dict[str, torch.nn.Module] = {
            name: module
            for name, module in modules.items()
            if isinstance(module, torch.nn.Module) and not any(word in name for word in NO_DENOISERS)
        }
        self._handles: list[Any] = []

    @property
    def has_counted(self) -> bool:
        """Return whether a network was called."""
        return bool(self.calls)

    def install(self) -> None:
        """Begin to count; :meth:`remove` undoes it."""
        for name, module in self._networks.items():
            if getattr(module, "_compiled_call_impl", None) is not None:
                continue  # compiled with its hooks: a new one would not run, or compile it again
            count = functools.partial(self._count_call, name)
            self._handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
        if self._step is not None:
            self._scheduler.step = InstanceMethod(self._scheduler, "step", self._counted(self._step))

    def remove(self) -> None:
        """Stop counting; may be called twice."""
        self._restore_scheduler()
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def finish(self) -> Stats:
        """Return the account, with the names of what could not be counted."""
        stats = self.stats
        stats.report["networks"] = dict(self.calls)
        uncounted = ["decodes", "nfe_by_resolution"]
        if not self.calls:
            uncounted += ["calls", "forwards"]
        if not stats.steps:
            uncounted += ["steps"]
        if not stats.nfe:
            uncounted += ["nfe"]
        stats.not_counted = sorted(uncounted)
        return stats

    def _count_call(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if any(word in name for word in NO_PREDICTORS):
            return
        self.stats.calls += 1
        latents = next((value for value in (*args, *kwargs.values()) if pictures(value)), None)
        self.stats.forwards += 0 if latents is None else len(latents)

    def _counted(self, step: Any) -> Any:
        signature, stats = inspect.signature(step), self.stats

        def counted_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            sample = signature.bind(*args, **kwargs).arguments.get("sample")
            stats.steps += 1
            stats.nfe += len(sample) if isinstance(sample, Tensor | list) else 0
            return result

        return counted_step

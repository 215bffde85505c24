"""What graphs of a module depend on beside its arguments, and whether it is still as it was.

Everything is compared at every call: the address of each parameter, buffer and other tensor, and all attributes of
every module and attention processor: adapters and their scales, submodules, hooks, numbers, modes. These are the
modules' own dicts, compared as wholes with copies, so that it takes about a microsecond a module; on a busy device that
time passes while it computes the calls before. A change of weights in place, as fusing a LoRA makes, needs nothing:
graphs read weights where they lie.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffaccel.errors import DiffAccelError

# attributes of the module itself that run around its forward, not in it
_AROUND = ("_forward", "_backward", "_state_dict", "_load_state_dict", "_is_full_backward", "_non_persistent")
_SKIPPED = ("forward", "_old_forward", "_compiled_call_impl", "_diffusers_hook")


class ModuleState:
    """A snapshot of a module and all that is in it.

    Args:
        hooks_inside: whether hooks of the module itself run inside of what is recorded, as compiled ones do.
    """

    def __init__(self, module: nn.Module, hooks_inside: bool = False) -> None:
        self._module, self._hooks_inside = module, hooks_inside
        self._names: list[str] = []
        self._live: list[Any] = []
        self._tensors: list[Tensor] = []
        for name, part in module.named_modules():
            if part is not module:
                self._note(name, vars(part))
            for attribute, value in vars(part).items():
                if _is_object(value) and not attribute.startswith("_diffaccel"):
                    self._note(f"{name}.{attribute}", vars(value))
                    self._tensors += [v for v in vars(value).values() if isinstance(v, Tensor) and _has_memory(v)]
            own = (*part._parameters.values(), *part._buffers.values(), *vars(part).values())
            self._tensors += [inner for value in own if isinstance(value, Tensor) for inner in _inner(value)]
        self._saved = [_copy(value) for value in self._live]
        self._own = _copy(self._of_itself())
        self._places = self._addresses()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _note(self, name: str, attributes: dict[str, Any]) -> None:
        self._names.append(name)
        self._live.append(attributes)

    def _of_itself(self) -> dict[str, Any]:
        hidden = () if self._hooks_inside else _AROUND
        attributes = vars(self._module).items()
        return {name: value for name, value in attributes if name not in _SKIPPED and not name.startswith(hidden)}

    def holds(self) -> bool:
        """Return whether nothing has changed."""
        try:
            same = self._live == self._saved and self._own == self._of_itself()
        except Exception:  # a tensor or array where another one was: these are not compared as a whole
            return False
        return same and self._places == self._addresses()

    def change(self) -> str:
        """Return the name of something that has changed."""
        for name, live, saved in zip(self._names, self._live, self._saved, strict=True):
            if (key := _difference(live, saved)) is not None:
                return f"{name}.{key}".lstrip(".")
        if (key := _difference(self._of_itself(), self._own)) is not None:
            return key
        return "the place of its weights"


def _difference(live: dict[str, Any], saved: dict[str, Any]) -> str | None:
    for key in {**live, **saved}:
        if key not in live or key not in saved:
            return str(key)
        try:
            if live[key] is not saved[key] and not live[key] == saved[key]:
                return str(key)
        except Exception:
            return str(key)
    return None


def _is_object(value: Any) -> bool:
    """Return whether an attribute is an object with settings of its own, such as an attention processor."""
    if isinstance(value, Tensor | nn.Module | type) or not hasattr(value, "__dict__"):
        return False
    module = type(value).__module__
    if module.startswith("diffaccel.modules") or type(value).__name__ == "HookRegistry":
        return False
    return module.partition(".")[0] not in ("builtins", "functools", "torch", "accelerate", "types")


def _copy(value: Any) -> Any:
    """Return a value with its containers copied: what is in them is compared with itself."""
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    if type(value) is list:
        return [_copy(item) for item in value]
    return set(value) if type(value) is set else value


def _inner(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of: itself, or those within a wrapper of quantized weights."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor] if _has_memory(tensor) else []
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in _inner(getattr(tensor, name))]


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() >= 0
    except RuntimeError:  # a wrapper
        return False


# -- what cannot be captured -------------------------------------------------------------------------------------------


def check(module: nn.Module) -> None:
    """Raise for a network whose weights move between its calls, or that another tool captures or splits.

    Raises:
        DiffAccelError: names what it is and how to do without.
    """
    kind = type(getattr(module, "_orig_mod", module)).__name__
    for part in module.modules():
        if "_hf_hook" in vars(part):
            raise DiffAccelError(
                f"'capture' needs the weights of {kind} in one place, and accelerate's offloading moves them. Leave "
                "out enable_model_cpu_offload() (pipe.remove_all_hooks() takes it off), or 'capture'."
            )
        if names := list(getattr(vars(part).get("_diffusers_hook"), "hooks", ())):
            raise DiffAccelError(
                f"'capture' would not run the hook '{names[0]}' of diffusers in {kind}, which offloads, casts or "
                "caches. Leave it out: disable_cache() for a cache, no group offloading; or leave out 'capture'."
            )
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(part).__mro__):
            raise DiffAccelError(f"'capture' needs the whole {kind} on one device, and FSDP shards it. Load it whole.")
        if _uses_graphs(part):
            raise DiffAccelError(
                f"{kind} is compiled with mode='reduce-overhead' or another one that captures it. Compile it with "
                "mode='max-autotune-no-cudagraphs' or the default one, or leave out 'capture'."
            )
    tensors = [*module.parameters(), *module.buffers()]
    if any(type(tensor).__name__ == "DTensor" for tensor in tensors):
        raise DiffAccelError(f"'capture' needs the whole {kind} on one device, and its weights are sharded.")
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise DiffAccelError(
            f"'capture' needs the whole {kind} on one device, and it is on {', '.join(devices)}. Load it without "
            "device_map and offloading."
        )


def hook_inside(module: nn.Module, hooks_inside: bool) -> str | None:
    """Return which hook a replay would leave out; None where there is none. Hooks around the module run as ever."""
    for name, part in module.named_modules():
        if (part is not module or hooks_inside) and (part._forward_hooks or part._forward_pre_hooks):
            return f"a hook is on {name or 'it'}, which is compiled" if part is module else f"a hook is on its {name}"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module, or a part of it, is compiled: what is would run as it was written under a mode."""
    parts = module.modules()
    return any(vars(part).get("_compiled_call_impl") is not None or "_orig_mod" in part._modules for part in parts)


def _uses_graphs(part: nn.Module) -> bool:
    """Return whether a module is compiled in a mode that records CUDA graphs itself."""
    for compiled in (vars(part).get("_compiled_call_impl"), part):
        getter = getattr(compiled, "__dict__", {}).get("get_compiler_config")
        settings = getter() if callable(getter) else None
        if settings and settings.get("triton.cudagraphs"):
            return True
    return False


def first_weight(module: nn.Module) -> Tensor | None:
    """Return a module's first parameter or buffer, or None."""
    for tensors in (module.parameters(), module.buffers()):
        if (first := next(tensors, None)) is not None:
            return first
    return None

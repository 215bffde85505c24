"""What the numbers of a reward depend on, as a digest: code with its constants and what it refers to, and weights.

A search is resumed from rewards that were computed before, so it has to know that they are of the same reward.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Path)
_BLOCKS, _SPREAD = 64, 1024  # sums of a weight, and single values of it, that go into a digest
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LIBRARIES = tuple(
    str(Path(path).resolve()) for name in ("stdlib", "purelib", "platlib") if (path := sysconfig.get_paths().get(name))
)


def digest(*values: Any) -> str:
    """Return sixteen hex digits of values: the same in another process, and others where anything differs.

    Functions count by their code, defaults, closures and the globals of their own module that they name; objects by
    their class and attributes, or by an attribute ``identity`` where they have one; networks by their weights.
    """
    walk = _Digester()
    for value in values:
        walk.add(value)
    return walk.hash.hexdigest()[:16]


def weights(network: nn.Module) -> str:
    """Return sixteen hex digits of a network's weights and of the strength of its adapters.

    Of every tensor these are name, shape, dtype, sums over blocks of its bits, and evenly spread values: gigabytes are
    read once, where they are.
    """
    walk = _Digester()
    walk.add_weights(network)
    return walk.hash.hexdigest()[:16]


class _Digester:
    """One pass through values and all that they refer to; what was met before counts by the place where it was met."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.met: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no id is used twice

    def note(self, *texts: object) -> None:
        for text in texts:
            data = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
            self.hash.update(f"{len(data)}:".encode() + data)

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self.note(type(value).__name__, repr(value))
        elif id(value) in self.met:
            self.note("again", self.met[id(value)])
        else:
            self.met[id(value)] = len(self.met)
            self.alive.append(value)
            self._add_new(value)

    def add_all(self, kind: str, values: Iterable[Any]) -> None:
        self.note(kind)
        for value in values:
            self.add(value)
        self.note("end")

    def _add_new(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.add_tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            self.note("array", value.dtype, value.shape, value.tobytes())
        elif isinstance(value, list | tuple):
            self.add_all("list", value)
        elif isinstance(value, dict):
            self.add_all("dict", (part for key in sorted(value, key=repr) for part in (key, value[key])))
        elif isinstance(value, set | frozenset):
            self.note("set", *sorted(digest(item) for item in value))
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, functools.partial):
            self.add_all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.add_all("method", (value.__func__, value.__self__))
        elif isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            self.note("name", getattr(value, "__module__", ""), value.__name__)
        elif isinstance(value, type):
            self._add_class(value)
        elif hasattr(value, "__wrapped__"):
            self.add(value.__wrapped__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        else:
            self._add_object(value)

    def _add_code(self, code: types.CodeType) -> None:
        self.note("code", code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        self.add_all("constants", code.co_consts)

    def _add_function(self, function: types.FunctionType) -> None:
        self.note("function", function.__qualname__)
        self.add(function.__code__)
        self.add_all("defaults", (function.__defaults__, function.__kwdefaults__))
        self.add_all("closure", (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)))
        if _is_own(function.__module__):
            known = function.__globals__
            self.add_all("globals", (part for name in _names(function.__code__) if name in known
                                     for part in (name, known[name])))  # fmt: skip

    def _add_class(self, cls: type) -> None:
        self.note("class", cls.__module__, cls.__qualname__)
        if _is_own(cls.__module__):
            members = sorted(vars(cls).items())
            kept = [(name, m) for name, m in members if not name.startswith("__") or name in ("__call__", "__init__")]
            self.add_all("members", (part for member in kept for part in member))
            self.add_all("bases", cls.__bases__)

    def _add_object(self, value: Any) -> None:
        if hasattr(value, "fingerprint"):  # a reward within another
            self.note("fingerprint", value.fingerprint())
            return
        identity = getattr(value, "identity", None)
        if identity is not None:
            self.note("identity", type(value).__qualname__, identity() if callable(identity) else identity)
            return
        self.add(type(value))
        if isinstance(value, nn.Module):
            self.add_weights(value)
            for name, module in value.named_modules():
                self.add(name)
                self.add(type(module))
                self._add_attributes({k: v for k, v in vars(module).items() if k != "training"}, plain=True)
        elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a picture of Pillow
            self.note(value.mode, value.size, value.tobytes())
        else:
            self._add_attributes(getattr(value, "__dict__", {}), plain=not _is_own(type(value).__module__))

    def _add_attributes(self, attributes: dict[str, Any], *, plain: bool) -> None:
        """Add an object's attributes; of a library's object the plain ones, since others may hold anything."""
        shown = [(k, v) for k, v in sorted(attributes.items()) if not plain or isinstance(v, _PLAIN)]
        self.add_all("attributes", (part for pair in shown for part in pair))

    def add_weights(self, network: nn.Module) -> None:
        for name, tensor in network.state_dict().items():
            self.note(name)
            if isinstance(tensor, Tensor):
                self.add_tensor(tensor)
        for name, module in network.named_modules():
            scaling = getattr(module, "scaling", None)  # of adapters (peft), which is in no weight
            if isinstance(scaling, dict):
                self.note("scaling", name, sorted(scaling.items()), getattr(module, "active_adapters", ""))

    def add_tensor(self, tensor: Tensor) -> None:
        self.note("tensor", tuple(tensor.shape), tensor.dtype)
        if tensor.is_meta or not tensor.numel():
            return
        try:
            flat = tensor.detach().resolve_conj().contiguous().flatten()
            words = flat.view(_WORDS.get(flat.element_size(), torch.uint8))
            whole = len(words) // _BLOCKS * _BLOCKS
            sums = words[:whole].view(_BLOCKS, -1).sum(1, dtype=torch.int64)
            rest = words[whole:].sum(dtype=torch.int64)[None]
            spread = words[:: max(1, len(words) // _SPREAD)].to(torch.int64)
            self.note(torch.cat([sums, rest, spread]).cpu().numpy().tobytes())
        except (RuntimeError, NotImplementedError, TypeError):  # a packed weight without bits of its own
            self.note("opaque")


def _is_own(module: str) -> bool:
    """Return whether a module is the user's: none of the standard library, of an installed package, or of diffaccel."""
    if module.partition(".")[0] in ("diffaccel", "builtins"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return True
    path = Path(file).resolve()
    return not str(path).startswith(_LIBRARIES) and not {"site-packages", "dist-packages"}.intersection(path.parts)


def _names(code: types.CodeType) -> list[str]:
    """Return the names that a function's code and the functions within it look up, sorted."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= set(_names(constant))
    return sorted(names)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False

"""What tables depend on beside a call's arguments, and whether it is still as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Snapshot:
    """The temporal modules of a network, with adapters and hooks on them, and the weights that their rows were made of.

    Args:
        names: of the modules.
        weights: that were read.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], weights: list[Tensor]) -> None:
        self._stands: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._live: list[tuple[str, dict[str, Any]]] = []
        for name in names:
            parent, _, attribute = name.rpartition(".")
            holder, module = network.get_submodule(parent), network.get_submodule(name)
            self._stands.append((holder._modules, attribute, module))
            self._live += [(name, vars(part)) for part in module.modules()]
        self._saved = [_copy(live) for _, live in self._live]
        self._weights = list({id(weight): weight for weight in weights}.values())
        self.stamp()

    def stamp(self) -> None:
        """Take the places and versions of the weights as they are now."""
        self._stamps = [_stamp(weight) for weight in self._weights]

    def change(self) -> str | None:
        """Return the name of something that has changed; None where everything is as it was."""
        for modules, attribute, module in self._stands:
            if modules.get(attribute) is not module:
                return attribute
        for (name, live), saved in zip(self._live, self._saved, strict=True):
            try:
                if live != saved:
                    return name
            except Exception:  # a tensor where another one was
                return name
        return None if self._stamps == [_stamp(weight) for weight in self._weights] else "weights"


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    kind = weight.dtype, weight.device
    try:
        return *kind, weight.data_ptr(), weight._version
    except RuntimeError:  # a wrapper, or of inference mode
        return *kind, id(weight), 0


def _copy(value: Any) -> Any:
    """Return a value with its dicts, lists and sets copied: what is in them is compared with itself."""
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    if type(value) is list:
        return [_copy(item) for item in value]
    return set(value) if type(value) is set else value

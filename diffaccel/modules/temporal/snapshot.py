"""What tables depend on beside a call's arguments, and whether it is still as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


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
        self._marks: list[int | None] = [None] * len(self._weights)
        self.stamp()

    def stamp(self) -> None:
        """Take the places and versions of the weights as they are now."""
        self._stamps = [_stamp(weight) for weight in self._weights]

    def mark(self, numbers: Callable[[Tensor], Tensor | None]) -> None:
        """Remember the bits of the weights, which a write through ``.data`` changes and a version does not show."""
        self._marks = _marks(self._weights, numbers)

    def rewritten(self, numbers: Callable[[Tensor], Tensor | None]) -> bool:
        """Return whether bits of a weight differ from those marked: one pass over the weights, and one wait."""
        return any(
            None not in (before, now) and before != now
            for before, now in zip(self._marks, _marks(self._weights, numbers), strict=True)
        )

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


def _marks(weights: list[Tensor], numbers: Callable[[Tensor], Tensor | None]) -> list[int | None]:
    """Return the sum of the bits of each weight as whole numbers; None where its numbers cannot be looked at."""
    places: list[int] = []
    sums: list[Tensor] = []
    for place, weight in enumerate(weights):
        values = numbers(weight)
        if (
            values is not None
            and type(values) is Tensor
            and values.element_size() in _WHOLE
            and not values.is_complex()
        ):
            places.append(place)
            sums.append(values.view(_WHOLE[values.element_size()]).sum(dtype=torch.int64))
    marks: list[int | None] = [None] * len(weights)
    for device in {value.device for value in sums}:
        here = [number for number, value in enumerate(sums) if value.device == device]
        for number, mark in zip(here, torch.stack([sums[number] for number in here]).tolist(), strict=True):
            marks[places[number]] = mark
    return marks


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

"""The file of a plan: the bits and calibrated ranges of each layer, and where they come from; read and compared."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError, first_line, shortened
from diffaccel.files import COUNT, NUMBER, atomic, misfit
from diffaccel.quant.formats import LEAST_GROUP, Clip
from diffaccel.quant.mixed.form import ACTIVATION_BITS, WEIGHT_BITS, InputScale, MixedFormat
from diffaccel.quant.plan import layers_of

PLAN_VERSION = 1
_ENTRY = {"size": COUNT, "low?": [NUMBER], "high?": [NUMBER], "split?": COUNT, "first_row?": bool}
_KEYS = {"weight", "activation", *(key.removesuffix("?") for key in _ENTRY)}


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        weight: bits of its weight.
        activation: bits of its input; 16 leaves it as it is.
        low: smallest calibrated value of each range of its input; empty where it was not calibrated.
        high: largest of each.
        split: channels of the first of two ranges; 0 for one range.
        first_row: whether its input has the plan's constant first row.
    """

    weight: int
    activation: int = 16
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    split: int = 0
    first_row: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that say something."""
        values: dict[str, Any] = {"weight": self.weight, "activation": self.activation}
        if self.low:
            values |= {"low": list(self.low), "high": list(self.high)}
        return values | ({"split": self.split} if self.split else {}) | ({"first_row": True} if self.first_row else {})


@dataclass(frozen=True)
class PrecisionPlan:
    """A plan for one network; prints as a table of its blocks.

    Attributes:
        network: class of the network, and the digest of its layers' shapes.
        layers: by name.
        sizes: number of weights of each layer, for averages.
        settings: options by which it was made.
        provenance: model, prompts, steps, scheduler, dtype, device and versions of the calibration.
        results: averages, objective, bound and gap of the program, measured error, seconds.
        first_row: constant first row of the text states, fp32 ``(K,)``.
    """

    network: dict[str, str]
    layers: dict[str, PlannedLayer]
    sizes: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    first_row: Tensor | None = None

    @property
    def weight_average(self) -> float:
        """Mean bits of a weight."""
        return sum(self.sizes[name] * layer.weight for name, layer in self.layers.items()) / sum(self.sizes.values())

    def write(self, path: Path) -> None:
        """Write the plan as JSON, one line a layer, whole or not at all."""
        head = {
            "format": PLAN_VERSION, "network": self.network, "settings": self.settings, "provenance": self.provenance,
            "results": self.results, "first_row": None if self.first_row is None else _text_of(self.first_row),
        }  # fmt: skip
        rows = [
            f"  {json.dumps(name)}: {json.dumps({'size': self.sizes[name], **layer.to_dict()})}"
            for name, layer in self.layers.items()
        ]
        text = json.dumps(head, indent=1)[:-2] + ',\n "layers": {\n' + ",\n".join(rows) + "\n }\n}\n"
        with atomic(path) as file:
            file.write(text.encode())

    def check(self, network: nn.Module) -> None:
        """Raise unless the plan is for a network of these layers and shapes."""
        names = {name for name, _, _, _ in layers_of(network)}
        if stray := sorted(set(self.layers) - names):
            raise DiffAccelError(
                f"The plan names {len(stray)} layers that {type(network).__name__} does not have: "
                f"{', '.join(stray[:5])}. Make a plan for this model."
            )
        if self.network["shapes"] != shapes_digest(network):
            raise DiffAccelError(
                f"The plan is for a {self.network['class']} with layers of other shapes than this "
                f"{type(network).__name__}. Make a plan for this model."
            )
        for name, _, _, module in layers_of(network):
            layer, channels = self.layers.get(name), module.get_parameter("weight").shape[1]
            if layer is None:
                continue
            is_linear, width = isinstance(module, nn.Linear), None if self.first_row is None else len(self.first_row)
            has_row = is_linear and width == channels  # rows are of tokens, and parts of channels
            if (layer.split and is_linear) or layer.split >= channels or (layer.first_row and not has_row):
                raise DiffAccelError(
                    f"The plan splits the {channels} channels of '{name}' at {layer.split}, or has another first row. "
                    "It is damaged; make it again."
                )

    def diff(self, other: PrecisionPlan) -> str:
        """Return the layers whose bits differ, a line each: name, bits here, bits there."""
        lines = []
        for name in sorted(set(self.layers) | set(other.layers)):
            here, there = (_bits_text(plan.layers.get(name)) for plan in (self, other))
            if here != there:
                lines.append(f"{name}  {here} -> {there}")
        return "\n".join(lines) or "no layer differs"

    def __str__(self) -> str:
        blocks: dict[str, list[str]] = {}
        for name in self.layers:
            parts = name.split(".")
            blocks.setdefault(".".join(parts[:2]) if parts[1:2] and parts[1].isdigit() else parts[0], []).append(name)
        width = max(map(len, blocks))
        lines = [f"{'block':<{width}}  layers  weight bits (2/4/8)   mean  activation bits (4/8/16)"]
        for block, names in blocks.items():
            weights = [self.layers[name].weight for name in names]
            inputs = [self.layers[name].activation for name in names]
            mean = sum(self.sizes[n] * self.layers[n].weight for n in names) / sum(self.sizes[n] for n in names)
            counts = "/".join(str(weights.count(b)) for b in WEIGHT_BITS)
            told = "/".join(str(inputs.count(b)) for b in ACTIVATION_BITS)
            lines.append(f"{block:<{width}}  {len(names):>6}  {counts:>19}  {mean:5.2f}  {told}")
        return "\n".join([*lines, f"mean bits of a weight: {self.weight_average:.3f}"])


def _bits_text(layer: PlannedLayer | None) -> str:
    return "none" if layer is None else f"w{layer.weight}a{layer.activation}"


def shapes_digest(network: nn.Module) -> str:
    """Return a digest of names and shapes of a network's layers."""
    told = [f"{name} {tuple(module.get_parameter('weight').shape)}" for name, _, _, module in layers_of(network)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def read_plan(path: str | Path) -> PrecisionPlan:
    """Read the file of a plan.

    Raises:
        DiffAccelError: for a file that is not there, is no plan, is of another version or lacks bits of a layer.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        version = values["format"]
    except FileNotFoundError as error:
        raise DiffAccelError(
            f"There is no plan '{path}'. Make one: diffaccel quantize MODEL --method mixdq --out DIR."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffAccelError(f"'{path}' is no plan ({first_line(error, 80)}). Give a plan.json.") from error
    if type(version) is not int or version != PLAN_VERSION:
        raise DiffAccelError(
            f"'{path}' has format version {version!r}; this diffaccel reads {PLAN_VERSION}. Update it."
        )
    try:
        layers = {name: _layer(name, entry) for name, entry in values["layers"].items()}
        plan = PrecisionPlan(
            values["network"], layers, {name: entry["size"] for name, entry in values["layers"].items()},
            values["settings"], values["provenance"], values["results"],
            None if values["first_row"] is None else _tensor_of(values["first_row"]),
        )  # fmt: skip
        if wrong := _damage(plan):
            raise ValueError(wrong)
        return plan
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DiffAccelError):
            raise
        raise DiffAccelError(f"The plan '{path}' is damaged: {first_line(error, 80)}. Make it again.") from error


def _damage(plan: PrecisionPlan) -> str:
    """Return what cannot be in a plan that was written whole, in words; nothing where all is well."""
    network, settings = plan.network, plan.settings
    if not all(isinstance(part, dict) for part in (network, settings, plan.provenance, plan.results)):
        return "its network, settings, provenance and results must be objects"
    if not all(isinstance(network.get(key), str) for key in ("class", "shapes")):
        return "its network lacks class or shapes"
    for option, allowed in (("scales", get_args(Clip)), ("activation_scale", get_args(InputScale))):
        if option in settings and settings[option] not in allowed:
            return f"settings.{option} must be of {allowed}"
    group = settings.get("group_size", 0)
    if type(group) is not int or group < 0:
        return "settings.group_size must be 0 or more"
    if not plan.layers or not all(size > 0 for size in plan.sizes.values()):
        return "it has no layers, or layers without weights"
    if plan.first_row is not None and not (len(plan.first_row) and bool(torch.isfinite(plan.first_row).all())):
        return "its first row is empty or not finite"
    for name, layer in plan.layers.items():
        is_range = len(layer.low) == len(layer.high) and all(
            math.isfinite(low) and math.isfinite(high) and low <= high
            for low, high in zip(layer.low, layer.high, strict=True)
        )
        if not is_range or layer.split < 0 or (layer.first_row and plan.first_row is None):
            return f"the range, split or first row of '{name}'"
    return ""


def _layer(name: str, entry: dict[str, Any]) -> PlannedLayer:
    weight, activation = entry.get("weight"), entry.get("activation", 16)
    is_whole = type(weight) is type(activation) is int  # 8.0 would be the name of a format that cannot be read
    if not is_whole or weight not in WEIGHT_BITS or activation not in ACTIVATION_BITS:
        raise DiffAccelError(
            f"The plan's layer '{name}' has {shortened(repr(weight), 20)} bits a weight and "
            f"{shortened(repr(activation), 20)} an activation; they must be of {WEIGHT_BITS} and {ACTIVATION_BITS}."
        )
    if wrong := misfit(entry, _ENTRY) or next(iter(set(entry) - _KEYS), ""):
        raise ValueError(f"{shortened(wrong, 20)} of '{name}'")
    low, high = (tuple(map(float, entry.get(end, ()))) for end in ("low", "high"))
    return PlannedLayer(weight, activation, low, high, entry.get("split", 0), entry.get("first_row", False))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a file, and raise for a name that is in it twice."""
    if twice := next((name for name, count in Counter(name for name, _ in pairs).items() if count > 1), None):
        raise ValueError(f"'{shortened(twice, 60)}' is in it twice")
    return dict(pairs)


def _text_of(row: Tensor) -> str:
    return base64.b64encode(row.detach().cpu().float().numpy().tobytes()).decode()


def _tensor_of(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())


def mixed_format(layer: PlannedLayer, module: Any, scale: InputScale, group_size: int) -> MixedFormat:
    """Return the format of a layer: groups that divide its rows, whole rows where none of 16 weights does."""
    columns = module.weight[0].numel()
    group = math.gcd(group_size, columns) if layer.weight < 8 and group_size and not layer.split else 0
    return MixedFormat(
        weight_bits=layer.weight, activation_bits=layer.activation, scale=scale, split=layer.split,
        group=group if group >= LEAST_GROUP and group % 2 == 0 and group < columns else 0, first_row=layer.first_row,
    )  # fmt: skip

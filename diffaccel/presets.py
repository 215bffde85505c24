"""Presets: a file of points, each a mix of methods and call settings with the certificate of what was measured.

``diffaccel tune`` writes one; ``accelerate(pipe, "preset.json")`` and ``diffaccel sample --preset`` load it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffaccel import registry
from diffaccel.errors import DiffAccelError, first_line, unknown
from diffaccel.families import networks
from diffaccel.files import COUNT, FILE_NAME, misfit, write_json
from diffaccel.record import check_format

FORMAT, KIND, SUFFIX = 1, "diffaccel preset", ".json"
CALL_ARGUMENTS = {"steps": "num_inference_steps"}  # settings of a point, and the call's arguments that they stand for
BASELINE = "baseline"
_SETTINGS = {"size?": ([COUNT], None)}
_POINT = {"methods": [{"name": str}], "call": {"steps?": COUNT}, "certificate?": ({"settings?": _SETTINGS}, None)}
_ARCHITECTURE = {"pipeline": str, "networks": [{"component": FILE_NAME, "class": str, "config": dict}]}
_PRESET = {"kind": str, "format": COUNT, "default": str, "points": dict, "architecture": _ARCHITECTURE}


@dataclass(frozen=True)
class PresetPoint:
    """One mix of methods.

    Attributes:
        name: such as "fast".
        methods: configs, as ``diffaccel.accelerate`` takes them.
        call: settings of the call that a caller may override: ``steps``.
        certificate: what was proven of it on held-out prompts; empty for the baseline.
    """

    name: str
    methods: tuple[Any, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    certificate: Mapping[str, Any] = field(default_factory=dict)

    def fill_in(self, stock_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a call's keyword arguments with the point's settings for those that the caller leaves out."""
        parameters = list(inspect.signature(stock_call).parameters)  # the first one is the pipeline
        taken = {*kwargs, *parameters[: len(args) + 1]}
        settings = {CALL_ARGUMENTS[key]: value for key, value in self.call.items()}
        return {**{key: v for key, v in settings.items() if key in parameters and key not in taken}, **kwargs}


@dataclass(frozen=True)
class Preset:
    """The points of a file.

    Attributes:
        source: the file, for messages.
        points: by name.
        default: name of the point that is taken where none is asked for.
        architecture: as :func:`architecture` returns it, of the pipeline that the points were measured on.
    """

    source: str
    points: Mapping[str, PresetPoint]
    default: str
    architecture: Mapping[str, Any]

    def point(self, name: str | None = None) -> PresetPoint:
        """Return a point by its name, or the default one.

        Raises:
            DiffAccelError: for an unknown name, with the nearest match.
        """
        if name is not None and name not in self.points:
            raise unknown(f"quality of the preset '{self.source}'", name, self.points)
        return self.points[name or self.default]

    def check(self, pipe: Any) -> None:
        """Raise when a pipeline has another architecture than the one that the points were measured on."""
        self._compare(architecture(pipe))

    def check_folder(self, folder: Path) -> None:
        """Raise as :meth:`check` does, for the files of a pipeline that is not open."""
        index = _json(folder / "model_index.json")
        networks_there = []
        for mine in self.architecture["networks"]:
            config = _json(folder / mine["component"] / "config.json")
            networks_there.append({"class": config.get("_class_name", mine["class"]), "config": _plain(config)})
        name = index.get("_class_name", self.architecture["pipeline"])
        self._compare({"pipeline": name, "networks": networks_there})

    def _compare(self, other: Mapping[str, Any]) -> None:
        difference = _difference(self.architecture, other)
        if difference:
            raise DiffAccelError(
                f"The preset '{self.source}' was measured on another architecture: {difference}. Use it with a "
                "pipeline of that kind, or make one for this pipeline with diffaccel tune."
            )


def is_preset(value: Any) -> bool:
    """Return whether an argument of ``accelerate`` names a preset's file."""
    return isinstance(value, Preset | Path) or (isinstance(value, str) and value.endswith(SUFFIX))


def read(path: str | Path | Preset) -> Preset:
    """Read a preset.

    Raises:
        DiffAccelError: for a file that is not there or damaged, one of a newer version, and a method or an option that
            is not installed here.
    """
    if isinstance(path, Preset):
        return path
    file = Path(path).expanduser()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DiffAccelError(f"There is no preset '{path}'. Make one with diffaccel tune.") from None
    except (OSError, ValueError, RecursionError) as error:  # the last one for brackets in many brackets
        raise DiffAccelError(f"The preset '{path}' cannot be read ({first_line(error)}). Make it again.") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise DiffAccelError(f"'{path}' is no preset of diffaccel. Give a file that diffaccel tune wrote.")
    check_format(values, FORMAT, f"The preset '{path}'")
    if part := misfit(values, _PRESET) or _misfit_of_points(values):
        raise DiffAccelError(f"The preset '{path}' is damaged: {part} is missing or no such value. Make it again.")
    points = {name: _point(str(path), name, entry) for name, entry in values["points"].items()}
    return Preset(str(path), points, values["default"], values["architecture"])


def _misfit_of_points(values: dict[str, Any]) -> str:
    points = values["points"]
    if not values["format"]:  # the first one is 1
        return "format"
    if values["default"] not in points:
        return "default"
    parts = (misfit(point, _POINT, f"points.{name}") for name, point in points.items())
    return next(filter(None, parts), "")


def _point(source: str, name: str, entry: dict[str, Any]) -> PresetPoint:
    configs = []
    for values in entry["methods"]:
        try:
            configs.append(registry.config_class(values["name"]).from_dict(values))
        except DiffAccelError as error:
            raise DiffAccelError(
                f"The point '{name}' of the preset '{source}' uses '{values['name']}', which does not fit this "
                f"installation: {error} Correct the file, or install the version or the plugin that it was made with."
            ) from error
    if wrong := entry["call"].keys() - CALL_ARGUMENTS.keys():
        raise unknown(f"call setting in the preset '{source}'", sorted(wrong)[0], CALL_ARGUMENTS)
    for number, config in enumerate(configs):
        if config.name in [other.name for other in configs[:number]]:
            raise DiffAccelError(f"The point '{name}' of the preset '{source}' has '{config.name}' twice. Keep one.")
    if entry["call"].get("steps") == 0:
        raise DiffAccelError(f"The point '{name}' of the preset '{source}' has steps 0; it must be 1 or more.")
    return PresetPoint(name, tuple(configs), entry["call"], entry.get("certificate") or {})


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a preset's file: ``default``, ``points``, ``architecture``, and whatever else is to be in it."""
    write_json(path, {"kind": KIND, "format": FORMAT, **values})


def architecture(pipe: Any) -> dict[str, Any]:
    """Return the class of a pipeline, and class and configuration of its networks, JSON-ready."""
    return {
        "pipeline": stock_name(pipe),
        "networks": [
            {
                "component": next((name for name in pipe.components if getattr(pipe, name, None) is network), ""),
                "class": type(network).__name__,
                "config": _plain(getattr(network, "config", {})),
            }
            for network in networks(pipe)
        ],
    }


def stock_name(pipe: Any) -> str:
    """Return the name of a pipeline's class, which an acceleration keeps."""
    return type(pipe).__name__


def _json(file: Path) -> dict[str, Any]:
    """Return what is in a config's file; nothing where it cannot be read, which loading it will say."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _plain(config: Any) -> dict[str, Any]:
    """Return the JSON-ready values of a network's config that say how it is built."""
    values = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return json.loads(json.dumps(values, default=str))


def _difference(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return how two architectures differ, in words; empty where they do not in what both say."""
    if own["pipeline"] != theirs["pipeline"]:
        return f"{own['pipeline']}, and this is {theirs['pipeline']}"
    if len(own["networks"]) != len(theirs["networks"]):
        return f"{len(own['networks'])} networks, and this has {len(theirs['networks'])}"
    for mine, other in zip(own["networks"], theirs["networks"], strict=True):
        if mine["class"] != other["class"]:
            return f"a {mine['class']}, and this has a {other['class']}"
        for key in mine["config"].keys() & other["config"].keys():
            if mine["config"][key] != other["config"][key]:
                return f"{key} is {mine['config'][key]} in its {mine['class']}, and {other['config'][key]} here"
    return ""

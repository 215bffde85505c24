"""Variants: one way to draw the same pictures, methods and call settings, written in one word.

``plain``, ``plain:steps=8``, ``dpmpp2m:steps=8``, ``euler:steps=4,state=stock``: names of methods joined by ``+``, or
``plain`` for the pipeline as it is; after a colon, settings of the call (steps, guidance, size, negative) and options
of the method, written ``name.option`` where there are several methods: ``euler+spectrum:steps=28,spectrum.growth=1.5``.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from diffaccel import registry
from diffaccel.errors import DiffAccelError, size_text, unknown
from diffaccel.runs.request import Request

PLAIN = "plain"
CALL = ("steps", "guidance", "size", "negative")
FILES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Variant:
    """Methods, and changes to a request's call.

    Args:
        methods: configs, as ``diffaccel.accelerate`` takes them; none is the plain pipeline.
        call: settings that replace a request's: steps, guidance, size, negative.
    """

    methods: tuple[Any, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)

    def of(self, request: Request) -> Request:
        """Return the request with this variant's methods and call settings."""
        return replace(request, methods=self.methods, **self.call)

    @property
    def name(self) -> str:
        """The word that :func:`parse` reads back: methods, call settings, and options that differ from the defaults."""
        options = [f"{key}={_word(value)}" for key, value in self.call.items()]
        several = len(self.methods) > 1
        for config in self.methods:
            defaults = {
                option.name: option.default if option.default_factory is MISSING else option.default_factory()
                for option in fields(config)
            }
            changed = {key: v for key, v in config.to_dict().items() if key in defaults and v != defaults[key]}
            prefix = f"{config.name}." if several else ""
            options += [f"{prefix}{key}={_option_word(value)}" for key, value in changed.items()]
        head = "+".join(config.name for config in self.methods) or PLAIN
        return f"{head}:{','.join(options)}" if options else head

    @property
    def folder(self) -> str:
        """The name in characters that a folder's name may have."""
        return re.sub(r"[^A-Za-z0-9._+=-]+", "-", self.name).strip("-")


def _word(value: Any) -> str:
    if isinstance(value, tuple | list):  # a size
        return size_text(value[0], value[1])
    return f"{value:g}" if isinstance(value, float) else str(value)


def _option_word(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_option_word, value))}]"
    if isinstance(value, str) and "," in value and not value.startswith("("):  # a word within this word
        return f"({value})"
    return "null" if value is None else _word(value)


def parse(text: str) -> Variant:
    """Return the variant that a word, or a YAML or JSON file, describes.

    A file holds a list of configs such as ``- {name: dpmpp2m}``, or ``{methods: [...], steps: 8}``.

    Raises:
        DiffAccelError: for an unknown method or option (with the nearest match), no method, a setting that is there
            twice, or a value that does not fit.
    """
    if text.endswith(FILES):
        return _from_file(Path(text))
    head, _, tail = text.partition(":")
    if not head.strip():
        raise DiffAccelError(
            f"The variant {text!r} names no method. Write {PLAIN} for the pipeline's own loop, as in {PLAIN}:steps=8."
        )
    names = [name for name in head.split("+") if name not in (PLAIN, "")]
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for name in names:
        if name not in registry.names():
            raise unknown("method", name, [PLAIN, *registry.names()])
    call: dict[str, Any] = {}
    given: set[str] = set()
    for part in filter(None, re.split(r",(?=[A-Za-z_][\w.]*=)(?![^(]*\))", tail)):
        key, equals, value = part.partition("=")
        if not equals:
            raise DiffAccelError(
                f"'{part}' in the variant '{text}' is no setting; write key=value, as in plain:steps=8."
            )
        owner, _, option = key.rpartition(".")
        full = f"{names[0]}.{option}" if len(names) == 1 and not owner and key not in CALL else key
        if full in given:
            raise DiffAccelError(f"The variant '{text}' gives {key} twice. Keep one.")
        given.add(full)
        if key in CALL:
            call[key] = _call_value(key, value)
        elif owner in options or (not owner and len(names) == 1):
            options[owner or names[0]][option] = value
        else:
            allowed = [*CALL, *(f"{name}.OPTION" for name in names)]
            raise DiffAccelError(f"In the variant '{text}': {unknown('setting', key, allowed)}")
    methods = []
    for name in names:
        config_class = registry.config_class(name)
        methods.append(config_class.from_dict(parse_fields(config_class, options[name])))
    return Variant(tuple(methods), call)


def _from_file(path: Path) -> Variant:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DiffAccelError(f"The variant file '{path}' cannot be read ({error}).") from error
    if isinstance(content, list):
        content = {"methods": content}
    if not isinstance(content, dict) or not isinstance(content.get("methods", []), list):
        raise DiffAccelError(f"'{path}' is no variant: it must hold a list of configs, or methods and call settings.")
    for key in content.keys() - {"methods", *CALL}:
        raise unknown(f"setting in '{path}'", key, ["methods", *CALL])
    methods = []
    for values in content.get("methods", []):
        values = {"name": values} if isinstance(values, str) else values
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise DiffAccelError(
                f"A method in '{path}' is {json.dumps(values)}; it must be a name, or options with a name."
            )
        if values["name"] not in registry.names():
            raise unknown("method", values["name"], registry.names())
        methods.append(registry.config_class(values["name"]).from_dict(values))
    call = {key: _call_value(key, str(content[key])) for key in CALL if key in content}
    return Variant(tuple(methods), call)


def _call_value(key: str, text: str) -> Any:
    try:
        if key == "steps":
            return int(text)
        if key == "guidance":
            return float(text)
    except ValueError:
        raise DiffAccelError(f"{key} is '{text}'; it must be a number.") from None
    return parse_size(text) if key == "size" else text


def parse_fields(config_class: type[Any], texts: dict[str, str]) -> dict[str, Any]:
    """Parse option texts into values of a config's fields.

    A text that does not fit its field is returned as it is; the config itself then raises a better error.
    """
    import typing

    from jsonargparse import ArgumentError, ArgumentParser

    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, text in texts.items():
        values[name] = text
        if name in hints:
            parser = ArgumentParser(exit_on_error=False)
            parser.add_argument("--value", type=hints[name])
            for written in (text, f"[{text}]"):  # several numbers, also without the brackets of a list
                try:
                    values[name] = parser.parse_args([f"--value={written}"]).value
                    break
                except ArgumentError:
                    continue
    return values


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse ``128`` or ``WIDTHxHEIGHT`` into (height, width)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise DiffAccelError(f"size is '{text}'; it must be a number of pixels such as 128, or WIDTHxHEIGHT as 128x96.")
    width = int(match[1])
    return int(match[2] or width), width

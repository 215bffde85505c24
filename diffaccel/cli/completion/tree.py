"""What can be completed: commands, their options, and the values of these, read from the parsers of the commands."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from importlib import import_module

from diffaccel import cli, registry, terminal, zoo
from diffaccel.cli import config_source
from diffaccel.eval import commands as eval_commands
from diffaccel.eval.sets import prompts
from diffaccel.runs.request import DTYPES
from diffaccel.runs.variant import PLAIN

_PATHS = ("FILE", "DIR", "RUN", "SET", "A", "B")  # metavars of what lies on the disk
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Option:
    """An option, or the positional words of a command, whose name is then empty.

    Attributes:
        takes_value: whether the next word is its value.
        values: known values.
        is_path: whether files are values too.
    """

    name: str
    help: str = ""
    takes_value: bool = True
    values: tuple[str, ...] = ()
    is_path: bool = False


@dataclass(frozen=True)
class Command:
    """A command: its words after ``diffaccel``, none for diffaccel itself, with its options and positional words."""

    words: tuple[str, ...]
    help: str
    options: tuple[Option, ...]
    positional: Option


def commands() -> list[Command]:
    """Return every command, those of ``eval`` included; methods of plugins are read and not imported."""
    tables = {(): cli.COMMANDS, ("eval",): eval_commands.COMMANDS}
    described, known = [], _known_values()
    for above, table in tables.items():
        help_text = cli.COMMANDS["eval"][1] if above else ""
        names = Option("", values=tuple(table))
        described.append(Command(above, help_text, (Option("--help", "how to use it", takes_value=False),), names))
        for name, (reference, text) in table.items():
            if (name,) not in tables:
                described.append(_command((*above, name), text, reference, known))
    return described


def _command(words: tuple[str, ...], help_text: str, reference: str, known: dict[str, tuple[str, ...]]) -> Command:
    module, _, function = reference.partition(":")
    parser = terminal.parser_of(getattr(import_module(module), function))
    options = [
        _option(action, name, known)
        for action in parser.described_actions()
        for name in action.option_strings
        if name.startswith("--")
    ]
    if words == ("sample",):
        options += _method_options()
    positional = Option("", values=_positional(words), is_path=words[0] == "eval")
    return Command(words, help_text, tuple(options), positional)


def _option(action: argparse.Action, name: str, known: dict[str, tuple[str, ...]]) -> Option:
    takes_value = action.nargs != 0
    values = tuple(map(str, action.choices or ())) or known.get(name, ())
    is_path = takes_value and (str(action.metavar).partition(" ")[0] in _PATHS or name in ("--model", "--prompts"))
    return Option(name, action.help or "", takes_value, values if takes_value else (), is_path)


def _known_values() -> dict[str, tuple[str, ...]]:
    """Return values of options by their names, which mean the same in every command."""
    return {
        "--model": tuple(zoo.names()),
        "--sampler": _methods("loop"),
        "--method": _methods("weights", "blocks", "graphs"),
        "--accel": (PLAIN, *_methods()),
        "--prompts": tuple(prompts.names()),
        "--dtype": DTYPES,
        "--device": ("auto", "cpu", "cuda", "mps"),
    }


def _methods(*touches: str) -> tuple[str, ...]:
    """Return the names of the methods, or of those that touch one of these parts.

    Names of plugins may hold characters that a shell would act on, and are left out.
    """
    references = {name: reference for name, reference in registry.names().items() if _PLAIN_WORD.fullmatch(name)}
    if not touches:
        return tuple(references)
    sources = {name: config_source.read(reference) for name, reference in references.items()}
    parts = {n: "loop" if source is None else source.variables.get("touches", "loop") for n, source in sources.items()}
    return tuple(name for name, part in parts.items() if part in touches)


def _positional(words: tuple[str, ...]) -> tuple[str, ...]:
    if words == ("explain",):
        return (*_methods(), *zoo.names())
    return ("bash", "zsh", "fish") if words == ("completion",) else ()


def _method_options() -> list[Option]:
    """Return ``--NAME.FIELD`` of every method, with the values of a choice."""
    options = []
    references = registry.names()
    for name in _methods():
        source = config_source.read(references[name])
        for field in (source.options or []) if source is not None else []:
            values = tuple(field["type"].split("|")) if "|" in field["type"] else ()
            known = values if all(_PLAIN_WORD.fullmatch(value) for value in values) else ()
            options.append(Option(f"--{name}.{field['name']}", field["help"], values=known))
    return options

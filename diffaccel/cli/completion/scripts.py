"""Scripts of completions for bash, zsh and fish."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence

from diffaccel.cli.completion.tree import Command, Option

# bash and zsh alike: the commands before the word, and what may follow them
_PLACE = """\
    case "$place|$word" in
      {steps}) place="${{place:+$place }}$word" ;;
    esac
  done
  case "$place|$before" in
{cases}
  esac
"""
_BASH = (
    """\
_diffaccel() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" place="" choices="" paths="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
"""
    + _PLACE
    + """\
  COMPREPLY=($(compgen -W "$choices" -- "$current"))
  if [ -n "$paths" ]; then
    compopt -o filenames 2>/dev/null
    local IFS=$'\\n'
    COMPREPLY+=($(compgen -f -- "$current"))
  fi
}}
complete -F _diffaccel diffaccel
"""
)
_ZSH = (
    """\
#compdef diffaccel
_diffaccel() {{
  local before="${{words[CURRENT-1]}}" place="" choices="" paths="" word
  for word in "${{(@)words[2,CURRENT-1]}}"; do
"""
    + _PLACE
    + """\
  compadd -- ${{=choices}}
  if [[ -n "$paths" ]]; then _files; fi
}}
if [[ "${{funcstack[1]}}" == _diffaccel ]]; then _diffaccel "$@"; else compdef _diffaccel diffaccel; fi
"""
)


def bash(commands: Sequence[Command]) -> str:
    """Return the script for bash."""
    return _BASH.format(steps=_steps(commands), cases=_cases(commands))


def zsh(commands: Sequence[Command]) -> str:
    """Return the script for zsh."""
    return _ZSH.format(steps=_steps(commands), cases=_cases(commands))


def _steps(commands: Iterable[Command]) -> str:
    """Return patterns of "the command so far|the next word" where the word is part of the command."""
    return "|".join(shlex.quote(f"{' '.join(c.words[:-1])}|{c.words[-1]}") for c in commands if c.words)


def _cases(commands: Iterable[Command]) -> str:
    """Return branches by "the command|the word before": the values of an option, then what a command takes."""
    lines = []
    for command in commands:
        place = " ".join(command.words)
        for option in command.options:
            if option.takes_value:
                lines.append(f"    {shlex.quote(f'{place}|{option.name}')}) {_assignments(option.values, option)} ;;")
        names = (*command.positional.values, *(option.name for option in command.options))
        lines.append(f"    {shlex.quote(f'{place}|')}*) {_assignments(names, command.positional)} ;;")
    return "\n".join(lines)


def _assignments(words: Iterable[str], option: Option) -> str:
    return f"choices={shlex.quote(' '.join(words))} paths={'1' if option.is_path else ''}"


def fish(commands: Sequence[Command]) -> str:
    """Return the script for fish."""
    lines = ["complete -c diffaccel -f"]
    subcommands = sorted({command.words[1] for command in commands if len(command.words) == 2})
    help_of = {command.words: command.help for command in commands}
    for command in commands:
        seen = [f"__fish_seen_subcommand_from {word}" for word in command.words] or ["__fish_use_subcommand"]
        if command.words == ("eval",):
            seen.append(f"not __fish_seen_subcommand_from {' '.join(subcommands)}")
        elif len(command.words) == 1:
            seen.append("not __fish_seen_subcommand_from eval")
        head = f"complete -c diffaccel -n {_fish_quote('; and '.join(seen))}"
        for value in command.positional.values:
            text = help_of.get((*command.words, value), "")
            lines.append(f"{head} -a {_fish_quote(value)} -d {_fish_quote(text)}")
        if command.positional.is_path:
            lines.append(f"{head} -F")
        lines += [f"{head} {_fish_option(option)}" for option in command.options]
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    value = "" if not option.takes_value else " -r -F" if option.is_path else " -x"
    words = f" -a {_fish_quote(' '.join(option.values))}" if option.values else ""
    text = re.split(r"[;(]|\. ", option.help)[0].strip().replace("%%", "%")
    return f"-l {_fish_quote(option.name[2:])}{value}{words} -d {_fish_quote(text)}"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[Sequence[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}

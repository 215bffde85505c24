"""Completions by the shells themselves; a shell that is not installed is left out."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from diffaccel import cli, registry, zoo
from diffaccel.cli.completion import scripts, tree
from diffaccel.eval import commands as eval_commands
from tests.layout import tree as source_tree

# one call of each shell for a list of lines: what it offers for the last word of each, a line of words apiece
DRIVERS = {
    "bash": """{script}
complete_line() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _diffaccel; echo "${{COMPREPLY[*]}}"; }}
{calls}""",
    "zsh": """compdef() {{ :; }}
compadd() {{ shift; shown+=("${{(M)@:#$words[CURRENT]*}}"); }}; _files() {{ :; }}
{script}
complete_line() {{ words=("$@"); CURRENT=$#; shown=(); _diffaccel; print -r -- $shown; }}
{calls}""",
    "fish": """{script}
function complete_line; complete -C (string join ' ' -- $argv) | string split -f1 \\t | string join ' '
echo; end
{calls}""",
}
LINES = {
    "diffaccel": {*cli.COMMANDS},
    "diffaccel eval": {*eval_commands.COMMANDS},
    "diffaccel sample --sampler": {n for n in registry.names() if registry.config_class(n).touches == "loop"},
    "diffaccel sample --method": {n for n in registry.names() if registry.config_class(n).touches != "loop"},
    "diffaccel explain emoji": {name for name in zoo.names() if name.startswith("emoji")},
    "diffaccel sample cat --model emoji-f": {name for name in zoo.names() if name.startswith("emoji-f")},
    "diffaccel sample --heun.s": {"--heun.state"},
    "diffaccel sample --heun.state": {"float32", "stock"},
    "diffaccel eval run --unt": {"--until"},
    "diffaccel sample cat --num": set(),
}


@pytest.fixture(scope="module")
def commands():
    return tree.commands()


@pytest.mark.parametrize("shell", scripts.SHELLS)
def test_a_shell_completes_commands_options_and_names(commands, tmp_path, shell):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    calls = []
    for line in LINES:
        words = line.split()
        complete = words[-1] in ("emoji", "emoji-f", "--heun.s", "--unt")
        calls.append(" ".join(["complete_line", *words, *([] if complete else ["''"])]))
    script = DRIVERS[shell].format(script=scripts.SHELLS[shell](commands), calls="\n".join(calls))
    arguments = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [program, *arguments], input=script, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.stderr == ""
    answers = done.stdout.splitlines() if shell != "fish" else done.stdout.replace("\n\n", "\n").splitlines()
    for (line, words), answer in zip(LINES.items(), answers, strict=True):
        assert set(answer.split()) - {"--help"} == words, line


def test_every_command_and_option_is_there(commands):
    described = {command.words: command for command in commands}
    leaves = {(name,) for name in cli.COMMANDS} | {("eval", name) for name in eval_commands.COMMANDS}
    assert described.keys() == leaves | {()}
    sample = {option.name for option in described["sample",].options}
    assert {"--prompts", "--out", "--smc.temperature"} <= sample
    assert {option.name for option in described["eval", "fid"].options} >= {"--extractor", "--json"}


@pytest.mark.slow
def test_it_loads_no_torch(tmp_path):
    code = "import sys; from diffaccel.cli import main; main(['completion', 'bash']); print('torch' in sys.modules)"
    assert source_tree.python("-c", code, cwd=tmp_path).stdout.endswith("False\n")


def test_names_that_a_shell_would_act_on_are_left_out(run, monkeypatch):
    monkeypatch.setattr(registry, "names", lambda: {"x$(touch hacked)'`": "nowhere:X", "plain.one": "nowhere:Y"})
    for shell in scripts.SHELLS:
        script = run("completion", shell).out
        assert "hacked" not in script and "plain.one" in script


def test_an_unknown_shell(run):
    done = run("completion", "fisch")
    assert done.status == 2 and "Did you mean 'fish'" in done.err

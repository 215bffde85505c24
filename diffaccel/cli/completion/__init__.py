"""``diffaccel completion SHELL``: a script that completes commands, options and names, made from the parsers."""

from __future__ import annotations

from diffaccel import terminal
from diffaccel.cli.completion import scripts, tree
from diffaccel.errors import unknown

_EXAMPLES = """examples:
  diffaccel completion bash > ~/.local/share/bash-completion/completions/diffaccel
  diffaccel completion zsh > ~/.zsh/completions/_diffaccel     (a folder of fpath, before compinit)
  diffaccel completion fish > ~/.config/fish/completions/diffaccel.fish
  eval "$(diffaccel completion bash)"                          (for this shell only; zsh alike)

The script holds the names of the methods and models of this installation; make it anew after installing a plugin."""


def run(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = terminal.Parser(
        prog="diffaccel completion", description="A script of completions for your shell.", epilog=_EXAMPLES
    )
    parser.add_argument("shell", metavar="SHELL", help=", ".join(scripts.SHELLS))
    options = parser.parse(argv)
    if options.shell not in scripts.SHELLS:
        raise unknown("shell", options.shell, scripts.SHELLS)
    terminal.write(scripts.SHELLS[options.shell](tree.commands()).rstrip())
    return 0

"""``diffaccel eval``: the table of its commands, and the function that runs one of them."""

from __future__ import annotations

from importlib import import_module

from diffaccel import terminal
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.commands import pictures, sets
from diffaccel.eval.errors import MetricFailed

# command -> function of its arguments that returns the exit status, and one line of help
COMMANDS = {
    "run": (
        "diffaccel.eval.commands.generate:run_generate",
        "generate a set of pictures: prompts, seeds, one way to draw them; resumable",
    ),
    "time": (
        "diffaccel.eval.commands.time:run_time",
        "variants of one model in turns on this machine: seconds, parts, memory, and ratios with intervals",
    ),
    "compare": (
        "diffaccel.eval.commands.compare:run_compare",
        "runs against a baseline: a report as JSON, markdown and one HTML file",
    ),
    "page": ("diffaccel.eval.commands.compare:run_page", "the page and tables of a report.json, made anew"),
    "diff": ("diffaccel.eval.commands.compare:run_diff", "what changed between two reports, beyond their intervals"),
    **{name: (f"diffaccel.eval.commands.sets:run_{name}", text) for name, text in sets.COMMANDS.items()},
    **{name: (f"diffaccel.eval.commands.pictures:run_{name}", text) for name, text in pictures.COMMANDS.items()},
    "stats": ("diffaccel.eval.commands.sets:run_stats", "mean and covariance of a set's features, for later distances"),
    "list": (
        "diffaccel.eval.commands.listing:run_listing",
        "metrics, protocols, extractors and scorers: what is here, and why not",
    ),
}


def main(argv: list[str]) -> int:
    """Run one command of ``diffaccel eval`` and return its exit status.

    Raises:
        MetricFailed: for an exception that no input explains.
        DiffAccelError: for an unknown command, and whatever the command refuses.
    """
    parser = terminal.Parser(prog="diffaccel eval", description="What an acceleration costs, and what it buys.")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below; each has its own --help")
    width = max(map(len, COMMANDS)) + 2
    parser.epilog = "commands:\n" + "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    options = parser.parse(argv[:1])
    if options.command is None:
        parser.print_help()
        return 2
    if options.command not in COMMANDS:
        raise unknown("command of eval", options.command, COMMANDS)
    module, _, function = COMMANDS[options.command][0].partition(":")
    try:
        return getattr(import_module(module), function)(argv[1:])
    except (DiffAccelError, BrokenPipeError):
        raise
    except Exception as error:
        raise MetricFailed(
            f"'eval {options.command}' failed: {type(error).__name__}: {error} (DIFFACCEL_DEBUG=1 shows where)"
        ) from error

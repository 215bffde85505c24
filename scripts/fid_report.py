"""An FID/CLIP report on accelerations of one model, by one command that goes on wherever it was stopped.

    python -m scripts.fid_report --accel dpmpp2m:steps=8 --prompts emoji-1000 --first 100 --out out/report

draws the baseline, the baseline with other seeds and every acceleration, times them in turns, measures what the same
wall time buys, and writes ``report.json``, ``report.html``, ``report.md``, ``report.csv`` and ``report.tex`` into the
folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffaccel import terminal, zoo
from diffaccel.cli import FAILED, INTERRUPTED
from diffaccel.errors import DiffAccelError
from diffaccel.eval.api import JUDGE
from diffaccel.eval.comparison import gate
from diffaccel.eval.report import console
from diffaccel.eval.report.accelerations import make_report
from diffaccel.eval.report.plan import ReportPlan
from diffaccel.eval.sets import requests
from diffaccel.runs import loading
from diffaccel.runs.loading import quiet_libraries
from diffaccel.runs.request import Request
from diffaccel.runs.variant import parse

REWARD = "emoji-clip-reward"
GATE_FAILED = 5


def make_parser() -> terminal.Parser:
    """Return the parser of the options."""
    parser = terminal.Parser(prog="python -m scripts.fid_report", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    terminal.add_model_options(parser)
    add("--baseline", default="plain", metavar="VARIANT", help="the way that others are compared with (default: plain)")
    add("--accel", action="append", default=[], metavar="VARIANT", help="a way to compare, as dpmpp2m:steps=8; several")
    add("--all", action="store_true", help="every registered method too; what cannot run is named with the reason")
    add("--no-searches", action="store_true", help="with --all: without methods that draw many pictures for one")
    add("--prompts", metavar="FILE", help="a file or emoji-1000; classes for a model that draws classes")
    add("--first", type=int, metavar="N", help="only the first N prompts")
    add(
        "--num", type=int, default=1, metavar="N", help="pictures of each prompt, or in all without prompts (default 1)"
    )
    add("--seed", type=int, default=0, metavar="S", help="picture i uses seed S + i (default 0)")
    add("--batch", type=int, default=8, metavar="B", help="pictures in one call, drawn and timed (default 8)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of each process")
    add("--turns", type=int, default=10, metavar="N", help="timed calls of each way (default 10)")
    add(
        "--time-batch", action="append", type=int, default=[], metavar="B",
        help="time all ways with B pictures in a call too; several",
    )  # fmt: skip
    add("--no-other-seeds", action="store_true", help="leave out what chance alone does")
    add("--no-equal-time", action="store_true", help="leave out what the same wall time buys")
    add(
        "--extractor", action="append", metavar="NAME",
        help="network for distances of distributions (default: tiny, or that of the shipped statistics)",
    )  # fmt: skip
    add("--clip", action="append", metavar="NAME", help=f"judges of the fit to prompts (zoo models: {JUDGE})")
    add("--reward", metavar="NAME", help=f"chooses the best of several pictures (zoo models: {REWARD})")
    add(
        "--reference", metavar="PATH",
        help="images, or a file of statistics, that distributions are compared with; none for the baseline's images "
        "(default: the training statistics that ship with a zoo model, else the baseline's images)",
    )  # fmt: skip
    add("--fail-if", metavar="RULE", help='exit with 5 when it holds, as in "clip_score<-1 or speedup<1.5"')
    add("--out", type=Path, required=True, metavar="DIR", help="the report's folder")
    add("--json", action="store_true", help="print report.json instead of tables")
    return parser


def plan_of(options: Any) -> ReportPlan:
    """Return the plan of the report that the options ask for."""
    request = Request(
        model=options.model, num=options.num, seed=options.seed, batch=options.batch, dtype=options.dtype,
        device=options.device, threads=options.threads,
    )  # fmt: skip
    texts = requests.load_texts(options.prompts, options.first)
    request = requests.with_texts(request, texts, loading.pipeline_class(options.model), options.first)
    zoo_with_prompts = options.model in zoo.names() and bool(request.prompts)
    return ReportPlan(
        request=request, baseline=parse(options.baseline),
        accelerated=tuple(parse(text) for text in options.accel), everything=options.all,
        searches=not options.no_searches,
        turns=options.turns, batches=tuple(dict.fromkeys(options.time_batch)),
        other_seeds=not options.no_other_seeds, equal_time=not options.no_equal_time,
        extractors=tuple(options.extractor) if options.extractor else None,
        judges=tuple(options.clip or ([JUDGE] if zoo_with_prompts else [])),
        reward=options.reward or (REWARD if zoo_with_prompts else ""), reference=options.reference,
    )  # fmt: skip


def run(argv: list[str]) -> int:
    """Make the report; return 5 where ``--fail-if`` holds, or an acceleration that was asked for could not run."""
    options = make_parser().parse(argv)
    rule = None if options.fail_if is None else gate.parse(options.fail_if)
    quiet_libraries(options.json or options.model in zoo.names())

    def progress(text: str) -> None:
        if not options.json:
            terminal.write_note(text)

    command = ["python", "-m", "scripts.fid_report", *argv]
    plan = plan_of(options)
    report = make_report(plan, options.out, command=command, progress=progress)
    if report is None:  # the first of several processes prints
        return 0
    terminal.write_json(report.report) if options.json else console.write(report.report)
    terminal.write_note(f"Open {options.out / 'report.html'}")
    failed, sentences = report.check_gate(rule, [variant.name for variant in plan.accelerated])
    for sentence in sentences:
        terminal.write_note(sentence)
    return GATE_FAILED if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run, with errors as one sentence on stderr, as ``diffaccel`` does."""
    terminal.share_cpu()
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as stop:
        terminal.write_error(str(stop) or "Stopped. The same command goes on.")
        return INTERRUPTED
    except DiffAccelError as error:
        terminal.write_error(f"error: {error}")
        return getattr(error, "exit_code", 2)
    except OSError as error:
        terminal.write_error(f"error: {error}")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())

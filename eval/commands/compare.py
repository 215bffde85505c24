"""``eval compare``: runs against a baseline, as a report and a gate; ``eval page`` and ``eval diff`` of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal
from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from diffaccel.eval.comparison.fidelity import Distance
    from diffaccel.eval.comparison.measures import Measures
    from diffaccel.eval.comparison.result import Comparison
    from diffaccel.eval.sets.run import Run

GATE_FAILED = 5
STDOUT = "-"  # in the place of a file
DIFF_TITLES = {
    "beyond": "Beyond the old report's intervals:",
    "unsure": "Moved, without an interval to judge by:",
    "gone": "In the old report only:",
    "added": "In the new report only:",
    "made": "Made with:",
}


def _compare_parser() -> terminal.Parser:
    parser = terminal.Parser(
        prog="diffaccel eval compare",
        description="Compare runs of the same prompts and seeds with a baseline.",
        epilog="example:\n  diffaccel eval compare runs/base runs/dpm8 --other-seeds runs/base2 --report report"
        ' --fail-if "ssim<0.8"',
    )
    add = parser.add_argument
    add("baseline", metavar="BASE", help="folder of the baseline's run")
    add("runs", nargs="+", metavar="RUN", help="folders of the runs to compare with it")
    add("--other-seeds", metavar="RUN", help="the baseline drawn with other seeds: what chance alone does")
    _add_networks(parser)
    add(
        "--reference",
        metavar="PATH",
        help="images, or a file of statistics, that distributions are compared with; none for the baseline's images "
        "(default: the training statistics that ship with a zoo model, else the baseline's images)",
    )
    add("--prompts", metavar="FILE", help="names the category of every prompt (default: looked up in packaged sets)")
    add("--device", default="auto", help="where networks compute: cpu, cuda, cuda:1, mps (default: the best there is)")
    add(
        "--allow-mixed-n",
        action="store_true",
        help="compare runs of different pictures: pairs on what they share, distributions on all",
    )
    add(
        "--timing", action="append", metavar="FILE",
        help="timing.json of turns on one machine; further ones, of other batches, for latency and throughput by batch",
    )  # fmt: skip
    add(
        "--report", type=terminal.output_path, metavar="DIR",
        help="write report.json, report.html, report.md, report.csv and report.tex here",
    )  # fmt: skip
    _add_export_options(parser)
    add("--fail-if", metavar="RULE", help='exit with 5 when it holds for a run, as in "ssim<0.8 or speedup<1.5"')
    add("--json", action="store_true", help="print the report as one JSON object")
    return parser


def _add_networks(parser: terminal.Parser) -> None:
    add = parser.add_argument
    add(
        "--extractor",
        action="append",
        metavar="NAME",
        help="network for distances of distributions (default: tiny, or that of the shipped statistics)",
    )
    add("--protocol", metavar="NAME", help="published preprocessing of the extractors, such as cmmd")
    add("--clip", action="append", metavar="NAME", help="CLIP for the fit to the prompts: of the zoo, or open_clip:...")
    add(
        "--scorer",
        action="append",
        metavar="NAME[:FILE]",
        help="what people would like better: hpsv2, pickscore, aesthetic, image-reward, or py:module:function",
    )
    add(
        "--lpips",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure LPIPS-Alex too, with AlexNet's weights from FILE or the cache",
    )
    add("--fvd", metavar="NAME", help="network of videos: torchscript:/path or py:module:function")
    add("--clip-frames", type=int, default=16, metavar="N", help="frames that it sees of every video (default 16)")
    add("--clip-stride", type=int, default=1, metavar="N", help="from one of them to the next (default 1)")
    add("--clip-size", type=int, metavar="PX", help="their height and width (default: as they are)")


def _add_export_options(parser: terminal.Parser) -> None:
    add = parser.add_argument
    add("--csv", type=_export_path, metavar="FILE", help="write every number and its interval as CSV; - prints it")
    add("--tex", type=_export_path, metavar="FILE", help="write a LaTeX table of the runs, for booktabs; - prints it")
    add("--markdown", action="store_true", help="print Markdown, as report.md has it")


def _export_path(text: str) -> Path | str:
    """Return the path of an export; "-" as it is: the export is printed in the place of the report's tables."""
    return STDOUT if text == STDOUT else terminal.output_path(text)


def run_compare(argv: list[str]) -> int:
    """Run ``eval compare`` and return its exit status: 5 when the rule of ``--fail-if`` holds."""
    options = _compare_parser().parse(argv)
    _check_outputs(options)
    from diffaccel.eval.commands.options import progress_printer
    from diffaccel.eval.comparison import compare_runs, gate
    from diffaccel.eval.sets.run import open_run
    from diffaccel.runs import loading

    device = loading.pick_device(options.device)
    rule = None if options.fail_if is None else gate.parse(options.fail_if)
    timings = [_read_timing(path) for path in options.timing or ()]
    baseline, runs = open_run(options.baseline), [open_run(path) for path in options.runs]  # before networks are read
    distances = _distances(options, device)
    measures = _measures(options, device, baseline, next(iter(timings), None), distances)
    comparison = compare_runs(baseline, runs, measures, progress=progress_printer(options))
    failed, sentences = gate.check_runs(rule, comparison)
    report = _report(comparison, timings, options.report, ["diffaccel", "eval", "compare", *argv])
    _write_report(options, report)
    if options.report is not None and not options.json:
        terminal.write_note(f"The report's page: {options.report / 'report.html'}")
    for sentence in sentences:
        terminal.write_note(sentence)
    return GATE_FAILED if failed else 0


def _distances(options: Any, device: Any) -> list[Distance]:
    """Return the distances of paired pictures: the built-in ones, and LPIPS where it is asked for."""
    from diffaccel.eval.comparison.fidelity import BUILT_IN, lpips_distance

    if options.lpips is None:
        return list(BUILT_IN)
    from diffaccel.eval.networks.lpips import load

    return [*BUILT_IN, lpips_distance(load(options.lpips or None, device=device))]


def _measures(
    options: Any, device: Any, baseline: Run, timing: dict[str, Any] | None, distances: list[Distance]
) -> Measures:
    """Load the networks that the options name, and open the other runs and the reference."""
    from diffaccel.eval.comparison.measures import Measures
    from diffaccel.eval.metrics.video import FrameSampling
    from diffaccel.eval.networks import by_spec
    from diffaccel.eval.sets.run import open_run

    sampling = FrameSampling(frames=options.clip_frames, stride=options.clip_stride, resolution=options.clip_size)
    return Measures.load(
        others=None if options.other_seeds is None else open_run(options.other_seeds), baseline=baseline,
        extractors=options.extractor, protocol=options.protocol, clips=options.clip or (),
        reference=options.reference, device=options.device,
        scorers=[by_spec.scorer(name, device) for name in options.scorer or ()],
        video=by_spec.of_videos(options.fvd, sampling, device) if options.fvd else None,
        prompts=options.prompts, distances=distances, timing=timing,
        allow_mixed_n=options.allow_mixed_n,
    )  # fmt: skip


def _report(
    comparison: Comparison, timings: list[dict[str, Any]], folder: Path | None, command: list[str]
) -> dict[str, Any]:
    """Return what is in ``report.json``; write the report's files where a folder is given."""
    from diffaccel.eval import report
    from diffaccel.eval.report import by_batch

    if (section := by_batch.section(timings)) is not None:
        comparison.sections.append(section)
    if folder is not None:
        return report.write(comparison, folder, command=command)
    return report.contents(comparison, command)


def _check_outputs(options: Any) -> None:
    """Raise for an output that cannot be written, before anything is measured."""
    exports = {"--csv": options.csv, "--tex": options.tex}
    printed = [f"{name} {STDOUT}" for name, path in exports.items() if path == STDOUT]
    printed += ["--json"] * options.json + ["--markdown"] * options.markdown
    if len(printed) > 1 and STDOUT in exports.values():
        raise DiffAccelError(
            f"{printed[0]} and {printed[1]} both print to standard output, which takes one of them. Name a file for an "
            "export, or leave one out."
        )
    for name, path in exports.items():
        if path not in (None, STDOUT):
            terminal.check_output(name, path)
    if options.report is not None:
        terminal.check_output("--report", options.report, folder=True)
        from diffaccel.eval.report import check_folder

        check_folder(options.report)


def _write_report(options: Any, report: dict[str, Any]) -> None:
    """Print a report as JSON, Markdown, an export or for the terminal, and write exports where that is asked for."""
    from diffaccel.eval.report import console, export
    from diffaccel.eval.report.markdown import markdown
    from diffaccel.files import write_text

    for path, text_of in ((options.csv, export.csv_text), (options.tex, export.latex_text)):
        if path == STDOUT:
            terminal.write(text_of(report).removesuffix("\n"))
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text_of(report))
    if STDOUT in (options.csv, options.tex):
        return
    if options.json:
        terminal.write_json(report)
    elif options.markdown:
        terminal.write(markdown(report))
    else:
        console.write(report)


def _read_timing(path: str) -> dict[str, Any]:
    try:
        timing = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"The timing file '{path}' cannot be read ({error}).") from error
    from diffaccel.eval.timing.turns import check_timing

    return check_timing(timing, path)


def run_page(argv: list[str]) -> int:
    """Run ``eval page`` and return its exit status."""
    parser = terminal.Parser(
        prog="diffaccel eval page",
        description="Make page, Markdown, CSV and LaTeX of a report anew, without measuring.",
        epilog="example:\n  diffaccel eval page report/report.json",
    )
    parser.add_argument("report", type=terminal.output_path, metavar="REPORT", help="report.json, or its folder")
    parser.add_argument("--out", type=terminal.output_path, metavar="DIR", help="write here (default: the same folder)")
    _add_export_options(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse(argv)
    options.report, report_path = options.out, options.report
    _check_outputs(options)
    from diffaccel.eval.report.remake import remake

    _write_report(options, remake(report_path, options.out))
    return 0


def run_diff(argv: list[str]) -> int:
    """Run ``eval diff`` and return its exit status."""
    parser = terminal.Parser(
        prog="diffaccel eval diff",
        description="What changed between two reports, beyond the intervals of the old one.",
        epilog="example:\n  diffaccel eval diff before/report.json after/report.json",
    )
    parser.add_argument("old", metavar="OLD", help="report.json, or its folder")
    parser.add_argument("new", metavar="NEW", help="report.json, or its folder")
    parser.add_argument("--json", action="store_true", help="print the changes as one JSON object")
    options = parser.parse(argv)
    from diffaccel.eval.report import changes

    sentences = changes.changes(changes.read(options.old), changes.read(options.new))
    if options.json:
        terminal.write_json(sentences)
        return 0
    for kind, title in DIFF_TITLES.items():
        if sentences[kind]:
            terminal.write("\n".join([title, *(f"  {sentence}" for sentence in sentences[kind])]))
    if not any(sentences.values()):
        terminal.write("Nothing changed.")
    return 0

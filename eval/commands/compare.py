"""``diffaccel eval compare``: runs against a baseline, as tables, a report and a gate; ``eval diff`` of two reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal as console
from diffaccel.errors import DiffAccelError

if TYPE_CHECKING:
    from diffaccel.eval.comparison.gate import Gate
    from diffaccel.eval.comparison.result import Comparison

GATE_FAILED = 5
DIFF_TITLES = {
    "beyond": "Beyond the old report's intervals:",
    "unsure": "Moved, without an interval to judge by:",
    "gone": "In the old report only:",
    "added": "In the new report only:",
    "made": "Made with:",
}


def _compare_parser() -> console.Parser:
    parser = console.Parser(
        prog="diffaccel eval compare",
        description="Compare runs of the same prompts and seeds with a baseline.",
        epilog="example:\n  diffaccel eval compare runs/base runs/dpm8 --other-seeds runs/base2 --report report"
        ' --fail-if "ssim<0.8"',
    )
    add = parser.add_argument
    add("baseline", metavar="BASE", help="folder of the baseline's run")
    add("runs", nargs="+", metavar="RUN", help="folders of the runs to compare with it")
    add("--other-seeds", metavar="RUN", help="the baseline drawn with other seeds: what chance alone does")
    add("--extractor", action="append", metavar="NAME", help="network for distances of distributions (default: tiny)")
    add("--protocol", metavar="NAME", help="published preprocessing of the extractors, such as cmmd")
    add("--clip", action="append", metavar="NAME", help="CLIP for the fit to the prompts: of the zoo, or open_clip:...")
    add(
        "--scorer",
        action="append",
        metavar="NAME[:FILE]",
        help="what people would like better: hpsv2, pickscore, aesthetic, image-reward, or py:module:function",
    )
    add(
        "--reference",
        metavar="PATH",
        help="images, or a file of statistics, that distributions are compared with (default: the baseline's images)",
    )
    add("--prompts", metavar="FILE", help="names the category of every prompt (default: looked up in packaged sets)")
    add("--device", default="auto", help="where networks compute: cpu, cuda, cuda:1, mps (default: the best there is)")
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
    add(
        "--allow-mixed-n",
        action="store_true",
        help="compare runs of different pictures: pairs on what they share, distributions on all",
    )
    add("--timing", metavar="FILE", help="timing.json of turns on one machine")
    add("--report", type=Path, metavar="DIR", help="write report.json, report.md and report.html here")
    add("--fail-if", metavar="RULE", help='exit with 5 when it holds for a run, as in "ssim<0.8 or speedup<1.5"')
    add("--json", action="store_true", help="print the report as one JSON object")
    return parser


def run_compare(argv: list[str]) -> int:
    """``eval compare``; returns its exit status: 5 when the rule of ``--fail-if`` holds."""
    options = _compare_parser().parse(argv)
    from diffaccel.eval import report
    from diffaccel.eval.commands.options import progress_of
    from diffaccel.eval.comparison import compare_runs, fidelity, text
    from diffaccel.eval.comparison import gate as gates
    from diffaccel.eval.comparison.measures import Measures, open_reference
    from diffaccel.eval.metrics.video import FrameSampling
    from diffaccel.eval.networks import by_spec as networks
    from diffaccel.eval.networks.extractors import as_clip, extractor
    from diffaccel.eval.report.markdown import markdown
    from diffaccel.eval.sets.run import open_run
    from diffaccel.runs import loading as opening

    device = opening.pick_device(options.device)
    gate = gates.parse(options.fail_if) if options.fail_if else None
    timing = _timing(options.timing)
    distances = list(fidelity.BUILT_IN)
    if options.lpips is not None:
        from diffaccel.eval.networks.lpips import load

        lpips = load(options.lpips or None, device=device)
        detail = {"weights_sha256": lpips.weights_sha256}
        distances.append(fidelity.Distance("lpips", "LPIPS-Alex", "lower", "", lpips, detail))
    baseline = open_run(options.baseline)
    named = options.extractor or ([] if baseline.is_video else ["tiny"])
    sampling = FrameSampling(frames=options.clip_frames, stride=options.clip_stride, resolution=options.clip_size)
    measures = Measures(
        others=open_run(options.other_seeds) if options.other_seeds else None,
        extractors=[extractor(name, device=device, protocol=options.protocol) for name in named],
        clips=[as_clip(extractor(name, device=device)) for name in options.clip or ()],
        scorers=[networks.scorer(name, device) for name in options.scorer or ()],
        video=networks.of_videos(options.fvd, sampling, device) if options.fvd else None,
        reference=open_reference(options.reference), prompts=options.prompts, distances=distances, timing=timing,
        allow_mixed_n=options.allow_mixed_n,
    )  # fmt: skip
    runs = [open_run(path) for path in options.runs]
    comparison = compare_runs(baseline, runs, measures, progress=progress_of(options))
    failed, said = _judge(gate, comparison)
    command = ["diffaccel", "eval", "compare", *argv]
    if options.report is not None:
        made = report.write(comparison, options.report, command=command)
    else:
        made = comparison.to_dict() | {"command": command, "verdicts": text.verdicts(comparison)}
    console.write_json(made) if options.json else console.write(markdown(comparison, made))
    for sentence in said:
        console.write_note(sentence)
    return GATE_FAILED if failed else 0


def run_diff(argv: list[str]) -> int:
    """``eval diff``; returns its exit status."""
    parser = console.Parser(
        prog="diffaccel eval diff",
        description="What changed between two reports, beyond the intervals of the old one.",
        epilog="example:\n  diffaccel eval diff before/report.json after/report.json",
    )
    parser.add_argument("old", metavar="OLD", help="report.json")
    parser.add_argument("new", metavar="NEW", help="report.json")
    parser.add_argument("--json", action="store_true", help="print the changes as one JSON object")
    options = parser.parse(argv)
    from diffaccel.eval.report import changes

    found = changes.changes(changes.read(options.old), changes.read(options.new))
    if options.json:
        console.write_json(found)
        return 0
    for kind, title in DIFF_TITLES.items():
        if found[kind]:
            console.write("\n".join([title, *(f"  {sentence}" for sentence in found[kind])]))
    if not any(found.values()):
        console.write("Nothing changed.")
    return 0


def _judge(gate: Gate | None, comparison: Comparison) -> tuple[bool, list[str]]:
    """Whether the rule holds for a run, and what it found of each."""
    failed, said = False, []
    for run in comparison.runs if gate else ():
        fails, sentences = gate.check(comparison.gate_values(run.name))  # type: ignore[union-attr]
        failed |= fails
        said += [f"{run.name}: {'FAILED' if fails else 'passed'}: {sentence}" for sentence in sentences]
    return failed, said


def _timing(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"The timing file '{path}' cannot be read ({error}).") from error

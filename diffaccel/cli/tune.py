"""``diffaccel tune``: the fastest plan that keeps a promise, with its certificate, as a preset."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffaccel import presets, terminal
from diffaccel.runs.variant import parse_size
from diffaccel.whole_folder import check_writable

OUT = Path("out") / "tune"
NOT_CERTIFIED = 5  # no plan kept the promise; the exit status of a gate that fails a build
_EXAMPLES = """examples:
  diffaccel tune                                        (emoji-flux: 15 minutes on a GPU, 30 on a CPU)
  diffaccel tune ./flux --prompts prompts.txt --fail-if "ssim<0.9 or clip_score[emoji-clip-judge]<-0.5"
  diffaccel tune --seconds 0.8                          (the nearest to the baseline within a time)
  diffaccel sample "a red apple" --preset out/tune/preset.json --quality balanced

A tuning that was stopped goes on when its command is repeated. In Python: accelerate(pipe, "out/tune/preset.json")."""


def make_parser() -> terminal.Parser:
    """Return the parser of the command."""
    parser = terminal.Parser(
        prog="diffaccel tune", description="Find the fastest mix of methods that keeps a promise.", epilog=_EXAMPLES
    )
    from diffaccel import zoo

    add = parser.add_argument
    add("model", nargs="?", default=zoo.DEFAULT, metavar="MODEL", help=f"as --model of sample (default {zoo.DEFAULT})")
    add("--prompts", metavar="SET", help="a packaged set or a file, to choose and to test by (default emoji-1000)")
    add("--fail-if", metavar="RULE", help='what no certified plan may do, as "ssim<0.9" (the default) or "lpips>0.1"')
    add("--seconds", type=float, metavar="S", help="a picture's most: find the plan nearest to the baseline within it")
    add("--methods", metavar="A,B", help="methods to choose from (default: all that say what may be tuned)")
    add("--budget", type=float, metavar="SECONDS", help="of the whole tuning (default: 900 on a GPU, 1800 on a CPU)")
    add("--lpips", metavar="FILE", help="weights of LPIPS, where the rule names it (default: where they usually are)")
    add("--steps", type=int, metavar="N", help="of the baseline (default: the model's own)")
    add("--size", metavar="N|WxH", help="pixels, as 128 or WIDTHxHEIGHT (default: the model's own)")
    add("--guidance", type=float, metavar="G", help="classifier-free or embedded guidance (default: the model's own)")
    add("--negative", metavar="PROMPT", help="negative prompt")
    add("--batch", type=int, default=1, metavar="B", help="images in one pipeline call (default 1)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads")
    add("--seed", type=int, default=0, metavar="K", help="of prompts, pictures and the search (default 0)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--out", type=terminal.output_path, default=OUT, metavar="DIR", help=f"folder of the tuning (default {OUT})")
    add("--json", action="store_true", help="print the preset as one JSON object, and no progress")
    return parser


def run(argv: list[str]) -> int:
    """Run the command and return its exit status: 5 when no plan kept the promise."""
    options = make_parser().parse(argv)
    size = parse_size(options.size)
    check_writable(options.out)
    from diffaccel.eval.tuning import tune

    with _Bar(shown=not options.json and sys.stderr.isatty()) as bar:
        tuned = tune(
            options.model, prompts=options.prompts, fail_if=options.fail_if, seconds=options.seconds,
            methods=None if options.methods is None else [name for name in options.methods.split(",") if name],
            budget=options.budget, out=options.out, seed=options.seed, lpips=options.lpips,
            announce=lambda text: None if options.json else terminal.write_note(text), progress=bar.show,
            steps=options.steps, size=size, guidance=options.guidance, negative=options.negative,
            batch=options.batch, dtype=options.dtype, device=options.device, threads=options.threads,
        )  # fmt: skip
    if options.json:
        terminal.write_json({"path": str(tuned.path), **tuned.preset})
    else:
        _write(tuned)
    return NOT_CERTIFIED if tuned.default == presets.BASELINE else 0


def _write(tuned: Any) -> None:
    """Print the front, the neighbours of the default point, the certificates, and how to load the preset."""
    rows = [_cells(row, "") for row in tuned.preset["table"]]
    rows += [_cells(row, "next to the default") for row in tuned.preset["neighbours"]]
    metrics = list(tuned.preset["table"][0]["measures"]) if tuned.preset["table"] else []
    columns = ["plan", "speed-up", *metrics, "within the rule", "prompts", ""]
    terminal.write_table("On the tuning prompts, the fastest first", columns, rows)
    for sentence in tuned.sentences():
        terminal.write(sentence)
    terminal.write(f'{tuned.path}: accelerate(pipe, "{tuned.path}"), or diffaccel sample --preset {tuned.path}')


def _cells(row: dict[str, Any], note: str) -> list[str]:
    values = [_number(value) + _range(low, high) for value, low, high in row["measures"].values()]
    keeps = "yes" if row["keeps"] else "no"
    return [row["plan"], f"{row['speedup']:.2f}x", *values, keeps, str(row["prompts"]), note]


def _number(value: float | None) -> str:
    return "identical" if value is None else f"{value:.4g}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None or low == high else f" ({low:.4g} to {high:.4g})"


class _Bar:
    """A bar of the budget's seconds on a terminal, with what is done next."""

    def __init__(self, shown: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=1, unit="s", disable=not shown, delay=1, bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s"
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, text: str, spent: float, budget: float) -> None:
        """Move to the seconds spent, of a budget."""
        self._bar.total = budget
        self._bar.set_description_str(text[:60], refresh=False)
        self._bar.n = min(spent, budget)
        self._bar.refresh()

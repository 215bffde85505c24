"""Split a search's lead over best of N, from a record of ``bench_search``, by kind of prompt.

    python -m scripts.bench_search_kinds docs/results/bench_search_emoji-flux_nvidia-h100-x1.json --pictures 1050

Intervals are 95 % over prompts, as in the record. Nothing is drawn again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from diffaccel.eval.sets import prompts
from diffaccel.eval.uncertainty import intervals
from scripts.bench_search import UNSEEN, rows_of


def leads(row: dict[str, Any], base: dict[str, Any], texts: list[str], kinds: list[str], score: str) -> dict[str, str]:
    """Return the difference to ``base`` over all pictures and over those of each kind of prompt, as text."""
    cells = {}
    for kind in ("all", *UNSEEN):
        pictures = [i for i in range(len(texts)) if kind in ("all", kinds[i])]
        scores, base_scores = ([r["scores"][score][i] for i in pictures] for r in (row, base))
        clusters = [texts[i] for i in pictures]
        lead = intervals.paired_difference(scores, base_scores, clusters=clusters).interval
        cells[kind] = f"{lead.value:+.2f} ({lead.low:+.2f} to {lead.high:+.2f}), n = {len(pictures)}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--pictures", type=int, help="rows of so many pictures; by default those with most")
    parser.add_argument("--score", choices=("judge", "reward"), default="judge")
    args = parser.parse_args()
    record = json.loads(args.record.read_text(encoding="utf-8"))
    options = record["options"]
    count = args.pictures or max(row["pictures"] for row in record["rows"])
    rows = [row for row in record["rows"] if row["pictures"] == count]
    texts = [text for text, _ in rows_of(options["set"], options["skip"], count // options["seeds"], options["seeds"])]
    prompt_set = prompts.read(options["set"])
    kind_of = dict(zip(prompt_set.texts, prompt_set.categories, strict=True))
    print(
        f"| {args.score}, against best of N | all | " + " | ".join(UNSEEN) + " |\n" + "|---" * (len(UNSEEN) + 2) + "|"
    )
    for row in rows:
        base = next((other for other in rows if other["variant"] == row.get("against")), None)
        if base is not None:
            cells = leads(row, base, texts, [kind_of[text] for text in texts], args.score)
            print(f"| {row['variant']} | " + " | ".join(cells.values()) + " |")


if __name__ == "__main__":
    main()

"""Make the package's prompt set: combinations that emoji-flux was never trained on, all kinds in turn.

    python -m scripts.zoo.emoji.prompts --data data/emoji --out eval/prompt_sets/emoji-1000.jsonl

A larger set, for comparisons that need narrow intervals:

    python -m scripts.zoo.emoji.prompts --count 8000 --without emoji-1000 --out data/emoji/emoji-7000.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import zip_longest
from pathlib import Path

from diffaccel import zoo
from diffaccel.eval.sets import prompts
from diffaccel.files import write_text
from scripts.zoo.emoji import heldout, recipe_flow
from scripts.zoo.emoji.data import restrict
from scripts.zoo.emoji.world import load

KINDS = {
    "style": "label in a style it was never shown in",
    "colour": "label in a colour it was never shown in",
    "count": "label in a number it was never shown in",
    "pair": "two labels that were never drawn together",
    "colour_pair": "the same in two colours",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--without", nargs="*", default=[], help="sets or files whose prompts are left out at the end")
    options = parser.parse_args()
    recipe = recipe_flow.get(zoo.card("emoji-flux")["recipe"])
    world = load(options.data)
    sets = heldout.build(restrict(world, recipe.labels) if recipe.labels else world, size=options.count)
    turns = zip_longest(*([(kind, text) for text in sets[kind].plain] for kind in KINDS))
    chosen = list(dict.fromkeys(pair for turn in turns for pair in turn if pair))[: options.count]
    excluded = {text for name in options.without for text in prompts.read(name).texts}
    chosen = [(kind, text) for kind, text in chosen if text not in excluded]
    rows = [json.dumps({"prompt": text, "category": kind}, ensure_ascii=False) for kind, text in chosen]
    write_text(options.out, "\n".join(rows) + "\n")
    for kind, number in Counter(kind for kind, _ in chosen).items():
        print(f"{number} {kind}: {KINDS[kind]}")


if __name__ == "__main__":
    main()

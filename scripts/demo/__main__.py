"""Draw with a model by the plain pipeline and by every sampler: ``python -m scripts.demo.__main__ --out out/demo``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.runs.loading import quiet_libraries
from diffaccel.terminal import share_cpu
from scripts.demo.page import default_variants, run_demo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of images, record.json, index.html")
    parser.add_argument("--model", default=zoo.DEFAULT, help=f"zoo name or folder (default {zoo.DEFAULT})")
    parser.add_argument("--steps", type=int, default=28, help="steps of the baseline (default 28)")
    parser.add_argument("--few", type=int, default=8, help="steps of the fast variants (default 8)")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default 0)")
    options = parser.parse_args()
    share_cpu()
    quiet_libraries(True)
    size = (options.size, options.size) if options.size else None
    variants = default_variants(options.model, options.steps, options.few)
    command = ["python", "-m", "scripts.demo.__main__", *map(shlex.quote, sys.argv[1:])]
    try:
        demo = run_demo(
            options.out, model=options.model, variants=variants, size=size, seed=options.seed, command=command
        )
    except DiffAccelError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    if demo["note"]:
        print(f"note: {demo['note']}")
    base, turns = demo["variants"][0], demo["variants"][0]["turns"]
    print(
        f"{base['label']}: {base['seconds']:.2f} s an image; the others against it, medians and ranges of {turns} turns"
    )
    print(f"{'variant':<26}{'times as fast':>14}{'range':>16}{'NFE':>6}{'difference':>13}")
    for row in demo["variants"]:
        low, high = row["speedup_range"]
        times = ("", "") if row is base else (f"{row['speedup']:.2f}", f"{low:.2f} to {high:.2f}")
        difference = "identical" if row["identical"] else f"{row['difference']:.2f} / 255"
        print(
            f"{row['label']:<26}{times[0]:>14}{times[1]:>16}{row['nfe']:>6g}{difference if row is not base else '':>13}"
        )
    print(f"Open {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

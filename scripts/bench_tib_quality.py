"""Measure quantized temporal features on a model with weights, and what they are worth in its pictures.

    python -m scripts.bench_tib_quality --model emoji-flux --steps 28 --out docs/results
    python -m scripts.bench_tib_quality --steps 28 --work out/tib-quality --minutes 9 --out docs/results

The first table has the errors of the features: a row is a form of the block (round-to-nearest with one range for all
timesteps, learned rounding with ranges for each, codes of exact features) at a number of weight bits; "confused" is the
share of timesteps whose feature is nearest to another timestep's. With ``--work`` the whole network is quantized to
W8A8 and W4A8 (see ``scripts.tib_table``), all rows are drawn and every pair is compared by FD and judge. Each call
works for at most ``--minutes`` and goes on where the last one stopped; exit status 4 says that work is left.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import diffaccel
from diffaccel.files import write_json
from diffaccel.quant import TIB
from diffaccel.record import describe_device
from diffaccel.training.loop import Deadline
from scripts import tib_table

UNFINISHED = 4


def features(pipe: Any, bits: int, iterations: int, steps: int) -> dict[str, Any]:
    """Return the report of the quantized block after a call, whose first network call calibrates it."""
    diffaccel.accelerate(pipe, TIB(bits=bits, iterations=iterations))
    try:
        generator = torch.Generator("cpu").manual_seed(0)
        pipe("red apple, fluent 3d", num_inference_steps=steps, generator=generator, output_type="latent")
        tables: list[dict[str, Any]] = diffaccel.summary(pipe).reports["tib"]["tables"]
        quantized: dict[str, Any] = tables[0]["quantized"]
        return quantized
    finally:
        diffaccel.remove(pipe)


def feature_rows(options: argparse.Namespace) -> dict[str, Any]:
    """Print the table of errors of features, and return its numbers."""
    pipe = diffaccel.load(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    rows = {}
    print("| weight bits | form | mean error | largest | confused | of round-to-nearest |\n|---|---|---|---|---|---|")
    for bits in options.bits:
        report = features(pipe, bits, options.iterations, options.steps)
        rows[str(bits)] = report
        for form, error in report["errors"].items():
            share = error["mean"] / report["errors"]["nearest"]["mean"]
            numbers = f"{error['mean']:.5f} | {error['largest']:.5f} | {error['confused']:.2%} | {share:.3f}"
            print(f"| {bits} | {form} | {numbers} |", flush=True)
    return rows


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4), default=[8, 4])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--iterations", type=int, default=1000, help="of the temporal block's learned rounding")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kind", default="cpu", help="name of the machine, for the record's file name")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    parser.add_argument("--work", type=Path, help="folder of models and pictures: also the table of whole networks")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, with --work")
    parser.add_argument("--prompts", default="emoji-1000")
    parser.add_argument("--count", type=int, default=1000, help="of the last prompts, which are drawn")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=100, help="pictures of a call")
    parser.add_argument("--block-iterations", type=int, default=1000, help="of every other block's learned rounding")
    parser.add_argument("--calibration", type=int, default=64, help="prompts that the model draws to learn on")
    parser.add_argument("--calibration-batch", type=int, default=16, help="of them in a call, which is a step's batch")
    return parser.parse_args()


def main() -> int:
    options = parse()
    deadline = Deadline(60 * options.minutes)
    values: dict[str, Any] = {"rows": feature_rows(options)}
    if options.work:
        found = tib_table.table(tib_table.setting_of(options, options.work), options.bits, deadline)
        if found is None:
            print("work is left: give the same command again")
            return UNFINISHED
        values["networks"] = found
    if options.out:
        command = " ".join(["python", "-m", "scripts.bench_tib_quality", *sys.argv[1:]])
        options.out.mkdir(parents=True, exist_ok=True)
        described = describe_device(torch.device(options.device))
        file = options.out / f"bench_tib_quality_{Path(options.model).name}_{options.kind}.json"
        write_json(file, {"command": command, "device": described, **values})
    return 0


if __name__ == "__main__":
    sys.exit(main())

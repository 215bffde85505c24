"""Measure quantized temporal features on a model with weights: their error, and which timestep they are nearest to.

    python -m scripts.bench_tib_quality --model emoji-flux --steps 28 --out docs/results

A row is a form of the block (round-to-nearest with one range for all timesteps, learned rounding with ranges for each,
codes of exact features) at a number of weight bits. ``--draw FOLDER`` draws the pictures of every form too, and prints
the command that compares them with the plain ones by FD and judge.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import diffaccel
from diffaccel.files import write_json
from diffaccel.quant import TIB
from diffaccel.record import describe_device

FORMS = ("nearest", "tiar", "cache", "auto")


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


def drawing(options: argparse.Namespace, bits: int | None, form: str, folder: Path) -> list[str]:
    """Return the command that draws the prompts of the judge's set with one form."""
    command = [sys.executable, "-m", "diffaccel", "sample", "--model", options.model, "--prompts", options.prompts]
    command += ["--steps", str(options.steps), "--device", options.device, "--out", str(folder)]
    if bits is not None:
        command += ["--method", "tib", "--tib.bits", str(bits), "--tib.features", form]
        command += ["--tib.iterations", str(options.iterations)]
    return [*command, *options.sample]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--prompts", default="emoji-1000", help="as of diffaccel sample, with --draw")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", type=Path, help="folder for the pictures of every form")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    parser.add_argument("--sample", nargs=argparse.REMAINDER, default=[], help="more words for diffaccel sample, last")
    options = parser.parse_args()
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
    if options.out:
        command = " ".join(["python", "-m", "scripts.bench_tib_quality", *sys.argv[1:]])
        options.out.mkdir(parents=True, exist_ok=True)
        described = describe_device(torch.device(options.device))
        write_json(
            options.out / f"bench_tib_quality_{options.model}.json",
            {"command": command, "device": described, "rows": rows},
        )
    if options.draw:
        forms = [(None, "plain"), *((bits, form) for bits in options.bits for form in FORMS)]
        folders = []
        for bits, form in forms:
            folders.append(options.draw / (form if bits is None else f"{form}-{bits}"))
            subprocess.run(drawing(options, bits, form, folders[-1]), check=True)
        print(shlex.join(["diffaccel", "eval", "compare", *map(str, folders), "--clip", "emoji-clip-judge"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

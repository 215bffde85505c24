"""Compare training with a vanishing side branch, without one, and by the data, on a target known in closed form.

    python -m scripts.qvgen_toy --bits 4 3 --seeds 3 --steps 400 --out docs/results

A small network of the Wan architecture learns the exact velocity of a mixture of Gaussians; it is then trained with few
bits, every way with the same draws and rates. The recipe that follows the data makes half of the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffaccel import record
from diffaccel.quant import QVGen
from diffaccel.quant.qvgen.run import QATRun

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import qvgen_bed

WAYS = ("lsq", "qvgen", "dsa", "dsa+rank")


def config_of(way: str, bits: int, args: argparse.Namespace) -> QVGen:
    """Return the settings of one way."""
    sides = {"rank": args.rank, "phase_steps": args.phase_steps}
    changes: dict[str, Any] = sides if way in ("qvgen", "dsa+rank") else {}
    rates = {"lr": args.lr, "scale_lr": args.lr, "rank_lr": args.lr, "clip_lr": 1e-2}
    steps = args.steps // 2 if "dsa" in way else args.steps
    return QVGen.preset(
        way, weight_bits=bits, act_bits=bits, steps=steps, batch=16, groups=10,
        log_seconds=0.0, save_seconds=1e9, **rates, **changes,
    )  # fmt: skip


def measured(net: Any, way: str, bits: int, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train once, and return losses, the error against the closed form, and the mean early norm of gradients."""
    config = config_of(way, bits, args)
    with tempfile.TemporaryDirectory() as folder:
        run = QATRun(qvgen_bed.teacher(net), qvgen_bed.samples(256), config, folder, seed=seed)
        start = run.fixed_loss(8)
        run.run()
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    early = [line["norm"] for line in lines if line["step"] <= config.steps // 5]
    return {"start": start, "distance": followed(run, net), "error": qvgen_bed.error(run.result(), 512),
            "early_norm": statistics.fmean(early)}  # fmt: skip


@torch.no_grad()
def followed(run: QATRun, net: Any) -> float:
    """Return the mean square distance of the student to the network that it follows, whatever its recipe."""
    draw = torch.Generator().manual_seed(5)
    x0, sigma = qvgen_bed.data(512, draw), torch.rand(512, generator=draw).clamp(1e-2, 1 - 1e-3)
    s = sigma.reshape(-1, 1, 1, 1, 1)
    x = (1 - s) * x0 + s * torch.randn(x0.shape, generator=draw)
    difference = qvgen_bed.call(run.student, x, sigma, None) - qvgen_bed.call(net, x, sigma, None)
    return float(difference.square().mean())


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """Train every way at every width and seed, and print a line for each."""
    net = qvgen_bed.trained()
    exact = qvgen_bed.error(net, 512)
    print(f"full precision: error {exact:.5f}", flush=True)
    rows = []
    for bits in args.bits:
        for way in args.ways:
            found = [measured(net, way, bits, seed, args) for seed in range(args.seeds)]
            row = {"way": way, "bits": bits, "seeds": found}
            rows.append(row)
            means = {key: statistics.fmean(f[key] for f in found) for key in found[0]}
            spread = statistics.stdev(f["distance"] for f in found) if args.seeds > 1 else 0.0
            print(
                f"W{bits}A{bits} {way:9} distance {means['distance']:.5f} (sd {spread:.5f}), "
                f"error {means['error']:.5f}, at the start {means['start']:.5f}, early norm {means['early_norm']:.4f}",
                flush=True,
            )
    return {"full_precision_error": exact, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--phase-steps", type=int, default=0, help="of each phase; 0 for all steps")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    values = compared(args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        report = record.Record(kind="qvgen_toy", settings=settings, command=["python", "-m", "scripts.qvgen_toy"])
        report.device = record.describe_device(torch.device("cpu"))
        report.finish(**values).save(args.out / "qvgen_toy_cpu.json")


if __name__ == "__main__":
    main()

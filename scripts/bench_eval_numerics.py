"""Measure time and memory of the distribution metrics at the sizes papers use, features already in memory.

    python -m scripts.bench_eval_numerics --device cuda --kind nvidia-h100-x1 --out docs/results

``--small`` takes a tenth of the rows and an eighth of the dimensions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from diffaccel import record
from diffaccel.eval.metrics import frechet, manifold, mmd
from diffaccel.files import write_json


def features(n: int, d: int, seed: int, device: torch.device) -> Tensor:
    """Draw rows that are correlated and not centred, with a falling spectrum, as features of networks are."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, d + 1).float() ** -0.5
    return (torch.randn(n, d, generator=generator) * spread + 0.4).to(device)


def timed(name: str, call: Callable[[], Any], device: torch.device, runs: int) -> dict[str, Any]:
    """Return the median seconds of a call, after one that warms up unless ``runs`` is 1, and its additional memory."""
    seconds, value, peak = [], None, None
    for turn in range(runs + (runs > 1)):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        value = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        if turn or runs == 1:
            seconds.append(time.perf_counter() - start)
    row = {"name": name, "seconds": median(seconds), "runs": len(seconds), "peak_bytes": peak, "value": value}
    memory = "" if peak is None else f"{peak / 2**30:.2f}"
    print(f"| {name} | {row['seconds']:.3f} | {memory} | {shown(value)} |", flush=True)
    return row


def shown(value: Any) -> str:
    """Return a number, or a tuple of them, as text."""
    return ", ".join(f"{v:.6g}" for v in (value if isinstance(value, tuple) else (value,)))


def measure(device: torch.device, small: bool, runs: int) -> list[dict[str, Any]]:
    """Print a row per metric and return all rows."""
    d, n_short, n_kid, n = (256, 100, 1000, 5000) if small else (2048, 1000, 10_000, 50_000)
    x, y = (features(n, d, seed, device) for seed in (0, 1))
    y *= 1.05
    print("| what | seconds | GiB beyond the features | value |\n|---|---|---|---|")
    a, b = frechet.Moments.of(x), frechet.Moments.of(y)
    rows = [
        timed(f"moments, n={n} d={d}", lambda: float(frechet.Moments.of(x).mean[0]), device, runs),
        timed(f"FD from statistics, d={d}", lambda: frechet.distance(a, b), device, runs),
        timed(
            f"FD from features, n=m={n_short} d={d}",
            lambda: frechet.distance_of_features(x[:n_short], y[:n_short]),
            device,
            runs,
        ),
        timed(f"KID, n=m={n_kid} d={d}", lambda: mmd.kid(x[:n_kid], y[:n_kid]), device, 1),
    ]
    if device.type == "cuda":
        root = torch.linalg.cholesky(a.covariance).T @ torch.linalg.cholesky(b.covariance)
        for driver in ("gesvd", "gesvdj"):
            call = lambda driver=driver: float(torch.linalg.svdvals(root, driver=driver).sum())  # noqa: E731
            rows.append(timed(f"singular values by {driver}, d={d}", call, device, 1))
    return [
        *rows,
        timed(f"precision and recall, n=m={n} d={d}", lambda: manifold.precision_recall(x, y), device, 1),
        timed(f"density and coverage, n=m={n} d={d}", lambda: manifold.density_coverage(x, y), device, 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--runs", type=int, default=3, help="timed calls of the short ones")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    device = torch.device(args.device)
    small = " --small" if args.small else ""
    values = {
        "command": f"python -m scripts.bench_eval_numerics --device {args.device} --runs {args.runs}{small}",
        "device": record.describe_device(device),
        "kind": args.kind,
        "date": time.strftime("%Y-%m-%d"),
        "versions": record.versions(),
        "rows": measure(device, args.small, args.runs),
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"bench_eval_numerics_{args.kind or args.device}{'_small' if args.small else ''}.json"
        write_json(args.out / name, values)


if __name__ == "__main__":
    main()

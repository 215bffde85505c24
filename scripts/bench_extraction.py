"""Measure feature extraction: images a second from memory, from PNGs, and of the network alone.

    python -m scripts.bench_extraction --device cuda --kind nvidia-h100-x1 --out docs/results

Inception with random weights, float32 without TF32. The network alone gets normalised tensors that are on the device
already, in batches of the same size; its lead is what reading, resizing and copying cost. PNGs are also opened (every
header is read) and decoded without a network. Times are of everything: files are listed, opened and read, processes
start and end.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.open import open_source
from diffaccel.eval.images.prefetch import map_batches
from diffaccel.eval.networks.extractors import Extractor, exact_float32
from diffaccel.eval.networks.extractors.inception import SIZE, InceptionNetwork, inception
from diffaccel.eval.networks.protocols import protocol
from diffaccel.files import write_json
from diffaccel.record import describe_device

PROTOCOLS = ("tf-fid", "clean-fid")
DISTINCT = 2048  # different pictures; a larger set repeats them, in files of their own
WARM_UP = 2048  # pictures of the call that warms up


def pictures(n: int, side: int) -> Tensor:
    """Draw noise over smooth colours, uint8 (n, 3, side, side): as costly to decode as a photograph."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 8, generator=generator)
    images = torch.empty(n, 3, side, side, dtype=torch.uint8)
    for i in range(n):
        smooth = torch.nn.functional.interpolate(coarse[i : i + 1], (side, side), mode="bilinear")[0]
        images[i] = (220 * smooth + 30 * torch.rand(3, side, side, generator=generator)).to(torch.uint8)
    return images


def seconds(work: Callable[[int], Any], n: int, device: str, turns: int) -> list[float]:
    """Return the seconds of ``turns`` calls for ``n`` pictures, after one for fewer that warms up."""
    times = []
    for turn in range(turns + 1):
        start = time.perf_counter()
        work(n if turn else min(n, WARM_UP))
        if device == "cuda":
            torch.cuda.synchronize()
        if turn:
            times.append(time.perf_counter() - start)
    return times


def bare(extractor: Extractor, batch: int) -> Callable[[int], None]:
    """Return a call of the network alone, on tensors of its own size that are on the device."""
    module: Any = extractor.module
    x = torch.rand(batch, 3, *SIZE, device=extractor.device) * 2 - 1

    def work(n: int) -> None:
        with torch.no_grad(), exact_float32(extractor.device):
            for start in range(0, n, batch):
                module.pool3(x[: n - start])

    return work


def measure(device: str, n: int, side: int, batch: int, turns: int, folder: Path) -> dict[str, Any]:
    """Return the images a second of every source, with and without the network."""
    images = pictures(min(n, DISTINCT), side)
    images = images.repeat(-(-n // len(images)), 1, 1, 1)[:n]
    pngs = folder / "pngs"
    pngs.mkdir()

    def save(i: int) -> None:
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(pngs / f"{i:05d}.png", compress_level=1)

    for _ in map_batches(save, range(n), 64):
        pass
    torch.manual_seed(0)
    torch.save(InceptionNetwork().state_dict(), folder / "random.pth")
    extractors = {
        name: inception(
            folder / "random.pth", preprocessing=protocol(name).preprocessing, protocol=name, device=device,
            allow_unknown_weights=True,
        )
        for name in PROTOCOLS
    }  # fmt: skip
    ways: dict[str, Callable[[int], Any]] = {"network alone": bare(extractors["tf-fid"], batch)}
    for name, extractor in extractors.items():
        for kind, source in (("memory", images), ("PNGs", pngs)):
            ways[f"{name}, from {kind}"] = lambda k, e=extractor, s=source: extract(
                open_source(s, num=k), e, batch=batch
            )

    def read(n: int) -> None:
        for _ in open_source(pngs, num=n).batches(batch, pinned=device == "cuda"):
            pass

    ways |= {"PNGs, opening alone": lambda k: open_source(pngs, num=k), "PNGs, opening and reading alone": read}
    rows = {}
    for way, work in ways.items():
        times = torch.tensor(seconds(work, n, device, turns), dtype=torch.float64)
        print(f"{way}: {n / float(times.median()):.0f} images/s", flush=True)
        rows[way] = {"images_per_second": n / float(times.median()), "seconds": times.tolist()}
    alone = rows["network alone"]["images_per_second"]
    for row in rows.values():
        row["of_the_network"] = row["images_per_second"] / alone
    return {"images": n, "side": side, "batch": batch, "turns": turns, "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=None, help="50000 on a GPU, 32 on a CPU")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    n = args.images or (50_000 if args.device == "cuda" else 32)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.device, n, args.side, args.batch, args.turns, Path(folder))
    name = describe_device(torch.device(args.device))["name"]
    record = {
        "command": f"python -m scripts.bench_extraction --device {args.device} --images {n} --side {args.side} "
        f"--batch {args.batch} --turns {args.turns}",
        "device": name,
        "cores": os.cpu_count(),
        "kind": args.kind,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        **result,
    }
    print(
        f"| {n} images of {args.side}x{args.side}, {name}, {os.cpu_count()} cores | images/s | of the network alone |"
    )
    print("|---|---|---|")
    for way, row in result["ways"].items():
        print(f"| {way} | {row['images_per_second']:.1f} | {row['of_the_network']:.2f} |")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"bench_extraction_{args.kind or args.device}.json"
        write_json(path, record)


if __name__ == "__main__":
    main()

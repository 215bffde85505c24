"""Time turns of score implicit matching against forward passes of their network, and measure their memory.

    python -m scripts.bench_distill --kind nvidia-h200 --out docs/results
    accelerate launch --multi_gpu --num_processes 2 -m scripts.bench_distill --kind nvidia-h200-x2 --out docs/results

The network is a class-conditional UNet of 15 M parameters at 32x32 with random weights, in bfloat16 by autocast. A turn
makes 11 forward-units (a forward 1, a gradient to the input 1, one to the weights too 2), 14 where one network at a
time keeps activations; ``units`` is its time over that of a forward pass without gradients. Under ``accelerate launch``
the batch is that of all processes together.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from diffaccel import processes
from diffaccel.distill import SIM, Distillation, NetworkTeacher
from diffaccel.files import write_json
from diffaccel.record import describe_device
from diffaccel.training.steps import computing
from scripts.timing import timed

LARGE = {
    "sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": (64, 128, 256), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), "num_class_embeds": 11,
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 32,
    "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
TINY = {**LARGE, "block_out_channels": (32, 32, 32), "layers_per_block": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "joint": {}, "sequential": {"sequential": True}, "two calls": {"student_steps": 2}, "rank 16": {"rank": 16},
    "sharded": {},
}  # fmt: skip


def make_teacher(config: dict[str, Any], batch: int, device: torch.device) -> NetworkTeacher:
    """Return a teacher with random weights under labels in turn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DModel(**config).eval().to(device)
    labels = torch.arange(batch, device=device) % 10

    def ask(network: Any, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return network(x, 1000 * sigma.to(x.device), class_labels=labels, return_dict=False)[0]

    return NetworkTeacher(network, ask, "velocity", (1, 32, 32), conditions=(labels,))


def forward_seconds(teacher: NetworkTeacher, batch: int, count: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of a forward pass of the batch without gradients."""
    x, sigma = torch.randn(batch, 1, 32, 32, device=device), torch.full((batch,), 0.5)

    def call() -> None:
        with torch.no_grad(), computing(device, dtype):
            teacher.ask(teacher.network, x, sigma, 0)

    return timed(call, count, device) / 1000


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the table: seconds of a forward pass, and of a turn of every variant with its memory."""
    named = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launch, device = processes.join(named)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cudnn.benchmark = device.type == "cuda"
    share = options.batch // launch.size
    teacher = make_teacher(TINY if options.tiny else LARGE, share, device)
    forward = forward_seconds(teacher, share, options.count, device, dtype)
    rows: dict[str, Any] = {}
    for name, changes in VARIANTS.items():
        sharded = name == "sharded"  # each process has a part of the weights: there is nothing to share alone
        if sharded and launch.size == 1:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = SIM(batch=options.batch, ema_pictures=options.batch, **changes)
            run = Distillation(teacher, config, folder, device=device, dtype=dtype, processes=launch, sharded=sharded)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            seconds = timed(run.turn, options.count, device) / 1000
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        rows[name] = {"seconds": round(seconds, 5), "units": round(seconds / forward, 2),
                      "pictures_a_second": round(options.batch / seconds, 1), "peak_bytes": peak,
                      "activation_bytes": max(peak - before, 0)}  # fmt: skip
        if launch.rank == 0:
            print(name, rows[name], flush=True)
    facts = {"kind": options.kind, "device": describe_device(device), "torch": torch.__version__}
    return {**facts, "processes": launch.size, "batch": options.batch, "forward_seconds": round(forward, 6),
            "turns": rows, "rank": launch.rank}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="cpu", help="name of the machine, for the file's name")
    parser.add_argument("--batch", type=int, default=256, help="of all processes together")
    parser.add_argument("--count", type=int, default=20, help="timed calls a row")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script")
    parser.add_argument("--out", type=Path, help="folder for bench_distill_KIND.json")
    options = parser.parse_args()
    table = measure(options)
    if options.out and table.pop("rank") == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / f"bench_distill_{options.kind}.json", table)


if __name__ == "__main__":
    main()

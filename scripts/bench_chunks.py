"""Time videos drawn chunk by chunk, with random weights: the stock AnyFlowFARPipeline beside a ring for its context.

    python -m scripts.bench_chunks --kind nvidia-h200 --out docs/results
    python -m scripts.bench_chunks --latent-frames 61 --turns 2 --kind nvidia-h200 --out docs/results

Batch 1, latents only, bf16 on a GPU, K = 4 steps a chunk, all ways on one device. Seconds are of a whole call, the
median and the range; "last chunk" is the time between the last two chunks' ends, which shows what grows with the video.
"difference" is the mean absolute difference of latents from those of the first way, relative to their mean absolute
value; the stock call with compiled blocks shows how large rounding alone is. Weights are random: rows say nothing of
pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler

import diffaccel
from diffaccel.files import write_json
from diffaccel.record import describe_device
from diffaccel.samplers import RollingContext
from scripts.timing import wait

Row = dict[str, Any]
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {  # options, and the video's height and width
    "1.3B": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 480, 832),  # as Wan 2.1's
    "tiny": (
        {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 1, "text_dim": 8}, 32, 32,
    ),
}  # fmt: skip
WAYS = ("stock", "stock, blocks compiled", "ring", "ring in graphs", "ring in graphs, blocks compiled")


class Bed:
    """A pipeline with random weights, and a call of it."""

    def __init__(self, name: str, device: torch.device, frames: int, steps: int) -> None:
        options, self.height, self.width = MODELS[name]
        self.name, self.device, self.frames, self.steps = name, device, frames, steps
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with device:
            network = AnyFlowFARTransformer3DModel(**options).to(dtype).eval()
        self.pipe = AnyFlowFARPipeline(None, None, network, None, FlowMapEulerDiscreteScheduler(shift=5.0))
        self.pipe.set_progress_bar_config(disable=True)
        self.text = torch.randn(1, 512, network.config.text_dim, device=device, dtype=dtype)
        rest = frames - 1
        self.chunks = [1, *[3] * (rest // 3), *[rest % 3] * (rest % 3 > 0)]

    def call(self) -> tuple[torch.Tensor, float, float]:
        """Return the latents, the seconds of the call, and those of its last chunk."""
        ends: list[float] = []

        def note(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == self.steps - 1:
                wait(self.device)
                ends.append(time.perf_counter())
            return values

        start = time.perf_counter()
        latents = self.pipe(
            prompt_embeds=self.text, height=self.height, width=self.width, num_frames=4 * (self.frames - 1) + 1,
            num_inference_steps=self.steps, chunk_partition=self.chunks, output_type="latent",
            generator=torch.Generator().manual_seed(0), callback_on_step_end=note,
        ).frames  # fmt: skip
        wait(self.device)
        return latents, time.perf_counter() - start, ends[-1] - ends[-2]


@contextlib.contextmanager
def prepared(bed: Bed, way: str) -> Iterator[None]:
    """Put a way of drawing on the pipeline."""
    if "compiled" in way:
        torch.compiler.reset()
        bed.pipe.transformer.compile_repeated_blocks(dynamic=False)
    if "ring" in way:
        diffaccel.accelerate(bed.pipe, RollingContext(capture=None if "graphs" in way else False))
    try:
        yield
    finally:
        diffaccel.remove(bed.pipe)
        for block in bed.pipe.transformer.blocks:
            block._compiled_call_impl = None


def measure(bed: Bed, way: str, turns: int, reference: torch.Tensor | None) -> tuple[Row, torch.Tensor]:
    """Return a row, and the latents of the first call, whose time does not count: it compiles and records."""
    if bed.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with prepared(bed, way):
        latents, _, _ = bed.call()
        row: Row = {"way": way, "first_call": time.perf_counter() - start}
        calls = [bed.call()[1:] for _ in range(turns)]
        told = diffaccel.summary(bed.pipe).reports.get("rolling_context", {})
    seconds, last = [call[0] for call in calls], [call[1] for call in calls]
    row |= {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    row |= {"last_chunk": statistics.median(last), "calls": len(calls)}
    if bed.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if told:
        row |= {"ring_gib": told["bytes"] / 2**30, "graphs": told["captures"], "evaluations": told["evaluations"]}
    plain = latents if reference is None else reference
    row["difference"] = float((latents.float() - plain.float()).abs().mean() / plain.float().abs().mean())
    return row, plain


def table(rows: list[Row], facts: Row) -> str:
    """Return rows as a Markdown table under a line that says what they are of."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        f"{facts['model']}, {facts['latent_frames']} latent frames of {facts['size']}, K = {facts['steps']}, batch 1, "
        f"one {facts['device']}, {facts['date']}", "", f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}",
    ]  # fmt: skip
    show = lambda value: f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)  # noqa: E731
    return "\n".join([*lines, *(f"| {' | '.join(show(row.get(key)) for key in keys)} |" for row in rows)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="1.3B")
    parser.add_argument("--ways", default=";".join(WAYS), help="which, with semicolons between")
    parser.add_argument("--latent-frames", type=int, default=21, help="of the video (default 21, 81 frames)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5, help="timed calls of each way")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    bed = Bed(args.model, device, args.latent_frames, args.steps)
    facts: Row = {
        "command": f"python -m scripts.bench_chunks {' '.join(sys.argv[1:] if argv is None else argv)}",
        "device": describe_device(device)["name"], "kind": args.kind, "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "model": args.model, "latent_frames": args.latent_frames,
        "size": f"{bed.width}x{bed.height}", "steps": args.steps,
    }  # fmt: skip
    rows, plain = [], None
    name = f"bench_chunks_{args.model}_{args.latent_frames}_{args.kind or args.device}.json"
    for way in args.ways.split(";"):
        try:
            row, plain = measure(bed, way, args.turns, plain)
        except (RuntimeError, ValueError) as error:  # of a compiler, or for lack of memory: the other rows count
            row = {"way": way, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(args.out / name, {**facts, "rows": rows})
    print(table(rows, facts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

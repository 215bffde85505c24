"""Time networks as they are, with channels last, captured, both, and compiled: one network call and one pipeline call.

    python -m scripts.bench_capture --case sdxl --compile --kind nvidia-h200 --out docs/results

Cases have random weights: SDXL's UNet (fp16, 1024x1024, both guidance branches), FLUX.1-dev's transformer (bf16,
1024x1024), and emoji-flux as it is (bf16, 128 px). Every row says whether its result equals to the bit that of the
network as it is in the same memory format, and how far it is from the plain one. "ms" is a call in a queue of calls, as
in a sampling loop; "alone" waits for each. The plain network is timed first and last.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

import diffaccel
from diffaccel.families import network
from diffaccel.files import write_json
from diffaccel.modules import Capture
from diffaccel.quant import W8A8
from diffaccel.record import describe_device

SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
TINY = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 32, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
}  # fmt: skip


def _drawn(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """Return a network with random weights, drawn on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def sdxl(device: str, config: dict[str, Any], size: int) -> tuple[Any, dict[str, Any]]:
    """Return SDXL without encoders and autoencoder, and the arguments of a guided call."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    unet = _drawn(lambda: UNet2DConditionModel(**config), device, dtype)
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = StableDiffusionXLPipeline(None, None, None, None, None, unet, scheduler, add_watermarker=False)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    texts = {name: draw(1, 77, config["cross_attention_dim"]) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pooled_texts = {name: draw(1, pooled) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipe, {**texts, **pooled_texts, "height": size, "width": size, "guidance_scale": 5.0}


def flux(device: str) -> tuple[Any, dict[str, Any]]:
    """Return FLUX.1-dev without encoders and autoencoder, and the arguments of a call."""
    transformer = _drawn(lambda: FluxTransformer2DModel(guidance_embeds=True), device, torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    text = torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16)
    pooled = torch.randn(1, 768, device=device, dtype=torch.bfloat16)
    return pipe, {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "height": 1024, "width": 1024}


def emoji(device: str) -> tuple[Any, dict[str, Any]]:
    """Return emoji-flux and the arguments of a call of 16 prompts."""
    pipe = diffaccel.load("emoji-flux").to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    return pipe, {"prompt": ["red apple, fluent 3d"] * 16, "height": 128, "width": 128, "max_sequence_length": 32}


CASES: dict[str, Callable[[str], tuple[Any, dict[str, Any]]]] = {
    "sdxl": lambda device: sdxl(device, SDXL, 1024),
    "flux": flux,
    "emoji-flux": emoji,
    "tiny": lambda device: sdxl(device, TINY, 64),
}


@dataclass
class Bench:
    """One pipeline; the arguments of its network's calls are those of its own first step."""

    pipe: Any
    call: dict[str, Any]
    steps: int
    repeats: int
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    plain: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # network's result, latents: by format

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        self.is_cuda = network(self.pipe).device.type == "cuda"
        calls: list[tuple[Any, Any]] = []
        handle = network(self.pipe).register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
        )
        self.draw(1)
        handle.remove()
        self.inputs = calls[0][0], {**calls[0][1], "return_dict": False}

    def draw(self, steps: int) -> Tensor:
        """Return the latents of a pipeline call."""
        generator = torch.Generator("cpu").manual_seed(0)
        return self.pipe(**self.call, num_inference_steps=steps, output_type="latent", generator=generator).images

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Return the result of a network call."""
        args, kwargs = self.inputs
        return network(self.pipe)(*args, **kwargs)[0]

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], calls: int = 1) -> float:
        """Return the seconds of a call, in a queue of ``calls``: the median of ``repeats`` queues."""
        times = []
        for _ in range(self.repeats):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            self.wait()
            times.append((time.perf_counter() - start) / calls)
        return float(torch.tensor(times, dtype=torch.float64).median())

    def host_seconds(self) -> float:
        """Return the seconds that the host needs to begin a network call on an idle device."""
        times = []
        for _ in range(self.repeats):
            self.wait()
            start = time.perf_counter()
            self.predict()
            times.append(time.perf_counter() - start)
        return float(torch.tensor(times, dtype=torch.float64).median())

    def row(self, way: str, layout: str, set_up: float = 0.0) -> dict[str, Any]:
        """Measure the pipeline as it is now.

        Args:
            layout: the memory format and cuDNN mode; the first row of each is what others of it are compared with.
        """
        start = time.perf_counter()
        for _ in range(3):
            result = self.predict()
        self.wait()
        set_up += time.perf_counter() - start
        latents = self.draw(self.steps)
        latents = self.draw(self.steps)
        expected = self.plain.setdefault(layout, (result.clone(), latents.clone()))
        first = next(iter(self.plain.values()))
        row = {
            "way": way,
            "ms": 1000 * self.seconds(self.predict, 10),
            "ms_alone": 1000 * self.seconds(self.predict),
            "host_ms": 1000 * self.host_seconds(),
            "ms_a_step": 1000 * self.seconds(lambda: self.draw(self.steps)) / self.steps,
            "set_up_s": set_up,
            "network_equal": torch.equal(result, expected[0]),
            "latents_equal": torch.equal(latents, expected[1]),
            "network_difference": _difference(result, first[0]),
            "latents_difference": _difference(latents, first[1]),
        }
        graphs = diffaccel.summary(self.pipe).reports.get("capture")
        return {**row, "layout": layout, "graphs": graphs}


def _difference(value: Tensor, plain: Tensor) -> dict[str, float]:
    """Return the largest difference and the norm of the difference over that of the plain value."""
    delta, plain = value.double() - plain.double(), plain.double()
    return {"largest": float(delta.abs().max()), "relative": float(delta.norm() / plain.norm())}


@contextlib.contextmanager
def channels_last(bench: Bench, benchmark: bool) -> Iterator[None]:
    """Store convolutions with channels last in this block, and let cuDNN time its algorithms where asked."""
    module = network(bench.pipe)
    module.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False
        module.to(memory_format=torch.contiguous_format)


def quantized(bench: Bench) -> list[dict[str, Any]]:
    """Return the rows of the captured network with int8 linears: convolutions as they are, by weights, and int8."""
    rows, last = [], Capture(memory_format="channels_last", cudnn_benchmark=True)
    for convs in ("keep", "weights", "int8"):
        for capture in (last, Capture(cudnn_benchmark=True))[: 1 + (convs != "weights")]:
            start = time.perf_counter()
            diffaccel.accelerate(bench.pipe, W8A8(convs=convs), capture)
            bench.wait()
            way = f"W8A8(convs='{convs}'), Capture({capture.memory_format}, cudnn_benchmark=True)"
            rows.append(bench.row(way, way, time.perf_counter() - start))
            print(f"{way}: {rows[-1]['ms']:.2f} ms", flush=True)
            diffaccel.remove(bench.pipe)
    return rows


def measure(bench: Bench, compiles: bool, quantizes: bool) -> list[dict[str, Any]]:
    """Return the rows of one case; the plain one is measured first and last."""
    rows = [bench.row("eager", "as it is")]
    has_convolutions = any(weight.ndim == 4 for weight in network(bench.pipe).parameters())
    diffaccel.accelerate(bench.pipe, Capture())
    rows.append(bench.row("Capture()", "as it is"))
    diffaccel.remove(bench.pipe)
    if has_convolutions:
        with channels_last(bench, benchmark=False):
            rows.append(bench.row("eager, channels_last", "channels_last"))
        with channels_last(bench, benchmark=True):
            rows.append(bench.row("eager, channels_last, cudnn.benchmark", "channels_last, benchmark"))
        diffaccel.accelerate(bench.pipe, Capture(memory_format="channels_last", cudnn_benchmark=True))
        way = "Capture(memory_format='channels_last', cudnn_benchmark=True)"
        rows.append(bench.row(way, "channels_last, benchmark"))
        diffaccel.remove(bench.pipe)
    if quantizes:
        rows += quantized(bench)
    if compiles:
        rows.append(_compiled(bench, has_convolutions))
    rows.append(bench.row("eager again", "as it is"))
    return rows


def _compiled(bench: Bench, is_unet: bool) -> dict[str, Any]:
    """Return the row of the whole network under ``torch.compile(mode="reduce-overhead")``."""
    name = "unet" if hasattr(bench.pipe, "unet") else "transformer"
    module = getattr(bench.pipe, name)
    layout: Any = channels_last(bench, benchmark=True) if is_unet else contextlib.nullcontext()
    with layout:
        setattr(bench.pipe, name, torch.compile(module, mode="reduce-overhead", fullgraph=True))
        try:
            return bench.row(f"torch.compile(reduce-overhead){', channels_last' * is_unet}", "compiled")
        finally:
            setattr(bench.pipe, name, module)
            torch.compiler.reset()


def table(case: str, device: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    eager = rows[0]["ms"]
    lines = [
        f"| {case}, {device} | over eager | ms | alone | host | ms a step | set-up s | GiB | network | latents | "
        "off plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = ["equal" if row[key] else "differ" for key in ("network_equal", "latents_equal")]
        gib = f"{row['graphs']['bytes'] / 2**30:.2f}" if row["graphs"] else ""
        lines.append(
            f"| {row['way']} | {row['ms'] / eager:.3f} | {row['ms']:.2f} | {row['ms_alone']:.2f} | "
            f"{row['host_ms']:.2f} | {row['ms_a_step']:.2f} | {row['set_up_s']:.1f} | {gib} | {' | '.join(same)} | "
            f"{row['network_difference']['relative']:.1e}, latents {row['latents_difference']['relative']:.1e} |"
        )
    return "\n".join(lines)


def main() -> int:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="repeat; default: sdxl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=10, help="of a pipeline call")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also the whole network compiled; minutes of set-up")
    parser.add_argument("--quantized", action="store_true", help="also captured with int8 linears and convolutions")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON records")
    args = parser.parse_args()
    device = describe_device(torch.device(args.device))["name"]
    for case in args.case or ["sdxl"]:
        pipe, call = CASES[case](args.device)
        rows = measure(Bench(pipe, call, args.steps, args.repeats), args.compile, args.quantized)
        print(table(case, device, rows), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            record = {
                "command": f"python -m scripts.bench_capture {' '.join(sys.argv[1:])}",
                "device": device,
                "kind": args.kind,
                "date": time.strftime("%Y-%m-%d"),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "case": case,
                "steps": args.steps,
                "rows": rows,
            }
            write_json(args.out / f"bench_capture_{case}_{args.kind or args.device}.json", record)
        del pipe, call
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time superposition on a UNet of the size of Stable Diffusion 1.5: one batched call a step against three calls.

    python -m scripts.bench_superdiff_speed --out docs/results

Random weights, 512x512, two components and no prompt. "three calls" is a loop as published code has it: one network
call for each prediction and the two-component formula, in fp32 and in bf16. What is compared takes turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import diffaccel
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.files import write_json
from diffaccel.record import describe_device, versions
from diffaccel.runs import profile
from diffaccel.samplers import SuperDiff

SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "sd15": (512, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "small": (64, {
        "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": 4, "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }),
}  # fmt: skip
GUIDANCE = 7.5


class Bench:
    """A pipeline without encoders and decoder, whose prompts have random encodings."""

    def __init__(self, model: str, device: str, dtype: torch.dtype, batch: int, steps: int) -> None:
        self.size, config = SIZES[model]
        self.device, self.dtype, self.batch, self.steps = device, dtype, batch, steps
        torch.manual_seed(0)
        with torch.device(device):
            unet = UNet2DConditionModel(**config).eval().requires_grad_(False).to(dtype)
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.pipe = StableDiffusionPipeline(
            None, None, None, unet, scheduler, None, None, requires_safety_checker=False
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.width = config["cross_attention_dim"]
        self.pipe.encode_prompt = self._encode

    def _encode(self, prompt: Any, device: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = 1 if isinstance(prompt, str) else len(prompt)
        generator = torch.Generator().manual_seed(len(prompt[0]))
        text = torch.randn(rows, 77, self.width, generator=generator)
        return text.to(self.device, self.dtype), torch.zeros_like(text).to(self.device, self.dtype)

    def ours(self) -> tuple[float, float]:
        """Return the seconds a step of a whole call, and those of its network calls."""
        diffaccel.accelerate(self.pipe, SuperDiff())
        try:
            with profile.measure(self.pipe) as measured:
                self.pipe(
                    ["first | the second one"] * self.batch, height=self.size, width=self.size, output_type="latent",
                    num_inference_steps=self.steps, guidance_scale=GUIDANCE,
                    generator=torch.Generator().manual_seed(0),
                )  # fmt: skip
            seconds = diffaccel.summary(self.pipe).last_run["seconds"]
        finally:
            diffaccel.remove(self.pipe)
        return seconds / self.steps, sum(measured.steps) / self.steps

    @torch.no_grad()
    def three_calls(self) -> tuple[float, float]:
        """Return the seconds a step of a loop with one network call for each prediction."""
        scheduler, unet, side = self.pipe.scheduler, self.pipe.unet, self.size // 8
        scheduler.set_timesteps(self.steps, device=self.device)
        texts = [self._encode([text] * self.batch, None)[0] for text in ("first", "the second one")]
        texts.append(torch.zeros_like(texts[0]))
        x = torch.randn(self.batch, 4, side, side, device=self.device, dtype=torch.float32) * scheduler.sigmas[0]
        self._wait()
        start = time.perf_counter()
        for i, t in enumerate(scheduler.timesteps):
            sigma, ds = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1] - scheduler.sigmas[i])
            fed = (x / (sigma**2 + 1) ** 0.5).to(self.dtype)
            a, b, null = (unet(fed, t, encoder_hidden_states=text).sample.float() for text in texts)
            noise = (2 * abs(ds) * sigma) ** 0.5 * torch.randn_like(x)
            apart, alone = a - b, 2 * ds * (null + GUIDANCE * (b - null)) + noise
            top = (abs(ds) * (b - a) * (a + b) - alone * apart).flatten(1).sum(1)
            kappa = top / (2 * ds * GUIDANCE * apart.square().flatten(1).sum(1))
            x = x + alone + 2 * ds * GUIDANCE * kappa[:, None, None, None] * apart
        self._wait()
        return (time.perf_counter() - start) / self.steps, 0.0

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Time all ways in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(SIZES), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also with a compiled network")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    half = torch.bfloat16
    options = (args.model, args.device)
    benches = {dtype: Bench(*options, dtype, args.batch, args.steps) for dtype in (torch.float32, half)}
    ways = {
        "three calls, float32": benches[torch.float32].three_calls, "three calls, bfloat16": benches[half].three_calls,
        "superdiff, bfloat16": benches[half].ours,
    }  # fmt: skip
    if args.compile:
        compiled = Bench(*options, half, args.batch, args.steps)
        compiled.pipe.unet.compile()
        ways["superdiff, bfloat16, compiled"] = compiled.ours
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(args.turns + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            taken = ways[name]()
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    rows = {}
    print("| way | ms a step | times as fast as three calls in float32 | share of a step outside the network |")
    print("|---|---|---|---|")
    first = [whole for whole, _ in seconds["three calls, float32"]]
    for name, taken in seconds.items():
        whole = [step for step, _ in taken]
        ratio = median_ratio(first, whole)
        outside = median(1 - network / step for step, network in taken) if "superdiff" in name else None
        rows[name] = {"ms_a_step": 1000 * median(whole), "ratio": ratio.to_dict(), "outside": outside}
        share = "" if outside is None else f"{100 * outside:.1f} %"
        print(f"| {name} | {1000 * median(whole):.2f} | {ratio.value:.2f} | {share} |")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        device = describe_device(torch.device(args.device))
        write_json(args.out / f"bench_superdiff_speed_{args.model}_{args.kind or args.device}.json", {
            "options": values, "device": device, "versions": versions(),
            "rows": rows,
            "date": time.strftime("%Y-%m-%d"),
        })  # fmt: skip


if __name__ == "__main__":
    main()

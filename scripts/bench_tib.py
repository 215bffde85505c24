"""Time and weigh pipelines as they are, with tables of temporal features, captured, and both; random weights.

    python -m scripts.bench_tib --case dit-2 --case dit-32 --case flux --case sd3 --case wan-ti2v \
        --kind nvidia-h200 --out docs/results

Cases: DiT-XL/2 at 256x256 with 2 and 32 rows, FLUX.1-dev and SD3-medium at 1024x1024, Wan 2.2 TI2V with a timestep for
each token, all in bf16. A row says the milliseconds of a step in the whole call, the bytes that are allocated when it
has ended, whether its result equals the plain one to the bit, and by how many seconds a call with a new prompt is
longer.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import network
from diffaccel.files import write_json
from diffaccel.modules import Capture
from diffaccel.quant import TIB
from diffaccel.record import describe_device
from diffaccel.record import versions as record_versions

Made = tuple[Any, Callable[[int], dict[str, Any]]]
DIT = {"num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "sample_size": 32}
TINY = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "sample_size": 8}
TI2V = {
    "num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48,
    "out_channels": 48, "text_dim": 4096,
}  # fmt: skip


def _drawn(make: Callable[[], Any], device: str) -> Any:
    """Return a network with random weights, drawn on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _random(device: str, seed: int, *shape: int) -> Tensor:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)


def dit(device: str, rows: int, config: dict[str, int] | None = None) -> Made:
    """Return DiT-XL/2 with an autoencoder of no weight, and the arguments of a guided call of ``rows / 2`` classes."""
    settings = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, **(config or DIT)}
    options = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero"}
    make = lambda: diffusers.DiTTransformer2DModel(**settings, **options, norm_elementwise_affine=False)  # noqa: E731
    vae = _drawn(lambda: diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4), device)
    pipe = diffusers.DiTPipeline(_drawn(make, device), vae, diffusers.DDIMScheduler(clip_sample=False))
    classes = list(range(rows // 2))
    return pipe, lambda prompt: {"class_labels": [(c + prompt) % 1000 for c in classes], "output_type": "pt"}


def flux(device: str) -> Made:
    """Return FLUX.1-dev without encoders and autoencoder, and the arguments of a call at 1024x1024."""
    transformer = _drawn(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), device)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, transformer)
    text = _random(device, 0, 1, 512, 4096)
    pooled = lambda prompt: _random(device, 1 + prompt, 1, 768)  # noqa: E731
    size = {"height": 1024, "width": 1024, "output_type": "latent"}
    return pipe, lambda prompt: {"prompt_embeds": text, "pooled_prompt_embeds": pooled(prompt), **size}


def sd3(device: str) -> Made:
    """Return SD3-medium without encoders and autoencoder, and the arguments of a guided call at 1024x1024."""
    config = {"num_layers": 24, "num_attention_heads": 24, "sample_size": 128, "pos_embed_max_size": 192}
    shape = {"attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "in_channels": 16}
    more = {"pooled_projection_dim": 2048, "out_channels": 16}
    transformer = _drawn(lambda: diffusers.SD3Transformer2DModel(**config, **shape, **more), device)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, *[None] * 7)
    texts = {name: _random(device, 0, 1, 333, 4096) for name in ("prompt_embeds", "negative_prompt_embeds")}
    negative = _random(device, 1, 1, 2048)

    def arguments(prompt: int) -> dict[str, Any]:
        pooled = {
            "pooled_prompt_embeds": _random(device, 2 + prompt, 1, 2048),
            "negative_pooled_prompt_embeds": negative,
        }
        return {**texts, **pooled, "height": 1024, "width": 1024, "output_type": "latent"}

    return pipe, arguments


def wan_ti2v(device: str) -> Made:
    """Return Wan 2.2 TI2V without encoder and autoencoder, and the arguments of a guided call of 49 frames."""
    transformer = _drawn(lambda: diffusers.WanTransformer3DModel(**TI2V), device)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer, expand_timesteps=True
    )
    pipe.vae_scale_factor_spatial = 16  # of its autoencoder
    names = ("prompt_embeds", "negative_prompt_embeds")
    size = {"height": 704, "width": 1280, "num_frames": 49, "output_type": "latent"}
    return pipe, lambda prompt: {name: _random(device, prompt, 1, 512, 4096) for name in names} | size


CASES: dict[str, tuple[Callable[[str], Made], int]] = {  # and the steps of a call
    "dit-2": (lambda device: dit(device, 2), 50),
    "dit-32": (lambda device: dit(device, 32), 50),
    "flux": (flux, 28),
    "sd3": (sd3, 28),
    "wan-ti2v": (wan_ti2v, 10),
    "tiny": (lambda device: dit(device, 2, TINY), 4),
}
METHODS: dict[str, list[Any]] = {
    "plain": [], "tib": [TIB()], "capture": [Capture()], "tib, capture": [TIB(), Capture()],
    "tib, weights on the device": [TIB(weights="device")],
}  # fmt: skip


@dataclass
class Bench:
    """One pipeline and its calls."""

    pipe: Any
    arguments: Callable[[int], dict[str, Any]]
    steps: int
    repeats: int

    def call(self, prompt: int = 0) -> tuple[Tensor, float]:
        """Return a result, and the seconds that it took."""
        generator = torch.Generator("cpu").manual_seed(0)
        arguments = {**self.arguments(prompt), "num_inference_steps": self.steps, "generator": generator}
        self._wait()
        start = time.perf_counter()
        output = self.pipe(**arguments)
        self._wait()
        seconds = time.perf_counter() - start
        value = output.frames if hasattr(output, "frames") else output.images
        return torch.as_tensor(value).clone(), seconds

    def _wait(self) -> None:
        if network(self.pipe).device.type == "cuda":
            torch.cuda.synchronize()

    def row(self, methods: list[Any], expected: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        """Return the figures of some methods, and their result."""
        if methods:
            diffaccel.accelerate(self.pipe, *methods)
        try:
            results = [self.call()[0] for _ in range(3)]
            seconds = sorted(self.call()[1] for _ in range(self.repeats))[self.repeats // 2]
            new_prompt = self.call(1)[1]
            gc.collect()
            row = {
                "ms_per_step": 1000 * seconds / self.steps,
                "new_prompt_seconds": new_prompt - seconds,
                "allocated_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
                "equal": expected is None or all(torch.equal(result, expected) for result in results),
                "reports": diffaccel.summary(self.pipe).reports,
            }
        finally:
            diffaccel.remove(self.pipe)
        return row, results[-1]


def measure(case: str, device: str, repeats: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Print the rows of one case, and give them to ``keep`` after each."""
    make, steps = CASES[case]
    pipe, arguments = make(device)
    pipe.set_progress_bar_config(disable=True)
    bench, rows, expected = Bench(pipe, arguments, steps, repeats), {}, None
    for name, methods in {**METHODS, "plain again": []}.items():
        try:
            row, result = bench.row(methods, expected)
        except DiffAccelError as error:
            rows[name] = {"refused": str(error)}
            keep(rows)
            print(f"| {case} | {name} | refused: {error} |", flush=True)
            continue
        expected = result if expected is None else expected
        rows[name] = row
        keep(rows)
        ratio = rows["plain"]["ms_per_step"] / row["ms_per_step"]
        print(
            f"| {case} | {name} | {ratio:.3f} | {row['ms_per_step']:.2f} | {row['allocated_bytes'] / 1e9:.2f} | "
            f"{row['new_prompt_seconds']:+.3f} | {'yes' if row['equal'] else 'NO'} |",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be given more than once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kind", default=None, help="name of the machine, for the record's file name")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| case | methods | times as fast | ms a step | GB | new prompt, s | equal |\n|---|---|---|---|---|---|---|")
    command = " ".join(["python", "-m", "scripts.bench_tib", *sys.argv[1:]])
    cases: dict[str, Any] = {}
    record = {
        "command": command, "device": describe_device(torch.device(device)), "date": time.strftime("%Y-%m-%d"),
        "versions": record_versions(), "cases": cases,
    }  # fmt: skip
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)

    def keep(case: str, rows: dict[str, Any]) -> None:
        cases[case] = rows
        if options.out:
            write_json(options.out / f"bench_tib_{options.kind or device}.json", record)

    for case in options.case or ["tiny"]:
        with torch.no_grad():
            measure(case, device, options.repeats, functools.partial(keep, case))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

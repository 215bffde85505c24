"""Quality of mixed precision on a model: what each part of MixDQ is worth, at four levels of bits and two of steps.

    python -m scripts.bench_mixdq --out out/mixdq --kind nvidia-h200                        # emoji-flux, 1,000 prompts
    python -m scripts.bench_mixdq --model ./emoji-sd --prompts emoji-1000 --calibration prompts.txt --out out/mixdq-sd
    python -m scripts.bench_mixdq --tables rows allocation --out out/mixdq                  # seconds

Every row adds one thing to the row before: uniform min-max, the stored first text row, bits by SQNR alone, by both
metrics (``MixDQ.paper()``), and our default. The Fréchet distance is to the plain network's pictures of other seeds;
differences are to the plain network's pictures of the same seeds, with 95 % intervals. The table ``rows`` tells whether
the first text row of the model is an outlier, and shows on a random SDXL UNet whose first row is scaled as published
what one scale for all tokens does (synthetic). What is finished is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.cli.planned import calibration_prompts
from diffaccel.eval.metrics.frechet_intervals import difference, distance_interval
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.sets import prompts as prompt_sets
from diffaccel.eval.uncertainty.intervals import paired_difference
from diffaccel.files import write_json
from diffaccel.quant import MixDQ
from diffaccel.quant.mixdq.allocate import LayerChoices, allocate
from diffaccel.quant.mixdq.calibrate import Recorder
from diffaccel.quant.mixdq.candidates import candidates
from diffaccel.quant.mixdq.drawings import RecordedCalls
from diffaccel.quant.mixdq.simulate import Bench
from diffaccel.quant.mixdq.work import make
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.request import Request
from diffaccel.runs.variant import parse_size
from scripts.ends import ends

TABLES = ("rows", "allocation", "quality")
LEVELS = {"W8A8": (8.0, 8.0), "W5A8": (5.0, 8.0), "W4A8": (4.0, 8.0), "W4A16": (4.0, 16.0)}
VARIANTS = ("uniform", "+ first row", "+ SQNR", "+ both metrics", "ours")
OTHER_SEEDS = 100_000
FIRST_ROW, OTHER_ROWS = 823.0, 12.0  # largest magnitudes, as arXiv 2405.17873 has them of SDXL-turbo
JUDGE = "emoji-clip-judge"


def config_of(variant: str, level: str, steps: int, args: argparse.Namespace) -> MixDQ:
    """Return the config of a row."""
    weight, activation = LEVELS[level]
    common = {
        "weight_bits": weight, "activation_bits": activation, "steps": steps, "samples": args.samples,
        "probes": args.probes, "ratios": args.ratios,
    }  # fmt: skip
    if variant == "ours":
        return MixDQ(**common)
    paper = {**common, "averages": args.averages}
    if variant == "+ both metrics":
        return MixDQ.paper(**paper)
    if variant == "+ SQNR":
        return MixDQ.paper(**paper, allocation="sqnr")
    bos = "auto" if variant == "+ first row" else "off"
    return MixDQ.paper(**paper, allocation="uniform", bos=bos, calibration="minmax")


class Quality:
    """A pipeline, prompts, the judge, and a folder of plans and features."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, loading.pick_device(args.device)
        request = Request(
            model=args.model, prompts=("x",), size=parse_size(args.size), dtype=args.dtype, device=args.device
        ).with_model_defaults()
        dtype = loading.pick_dtype(args.dtype, self.device)
        self.pipe = loading.open_pipeline(request, loading.locate(args.model)[0], self.device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.arguments = {
            name: value for name, value in call_arguments(self.pipe, request).items()
            if name not in ("prompt", "num_inference_steps", "generator", "output_type")
        }  # fmt: skip
        self.texts = prompt_sets.read(args.prompts).texts[: args.count]
        self.measured = calibration_prompts(args.model, args.calibration, args.samples)
        self.judge = as_clip(extractor(JUDGE, device=self.device))
        self.captions = _unit(self.judge.texts(list(self.texts))).cpu()
        args.out.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def features(self, name: str, steps: int, seed: int) -> Tensor:
        """Return the judge's features of the pictures that the pipeline draws now, drawn where they are not kept."""
        file = self.args.out / "features" / f"{name}_{steps}_{len(self.texts)}.safetensors"
        if file.is_file():
            return load_file(file)["features"]
        parts = []
        for start in range(0, len(self.texts), self.args.batch):
            batch = list(self.texts[start : start + self.args.batch])
            arguments = dict(self.arguments)
            if isinstance(arguments.get("negative_prompt"), str):
                arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
            images = self.pipe(
                prompt=batch, num_inference_steps=steps, output_type="pt",
                generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(batch))],
                **arguments,
            ).images  # fmt: skip
            pictures = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
            parts.append(self.judge(pictures.to(self.device)).float().cpu())
        features = torch.cat(parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features}, file)
        return features

    def scores(self, features: Tensor) -> Tensor:
        """Return the judge's score of every picture for its prompt, in points."""
        return 100 * (_unit(features) * self.captions).sum(1).clamp_min(0).double()

    def plan(self, variant: str, level: str, steps: int) -> tuple[MixDQ, float]:
        """Make a plan, or read it; what was measured for another level of the same variant is used again."""
        from dataclasses import replace

        config = config_of(variant, level, steps, self.args)
        folder = self.args.out / "plans" / f"{steps}_{VARIANTS.index(variant)}_{level}"
        folder.mkdir(parents=True, exist_ok=True)
        for other in sorted(folder.parent.glob(f"{steps}_{VARIANTS.index(variant)}_*")):
            if (other / "plan.json").is_file() and not (folder / "work.json").is_file():
                shutil.copyfile(other / "calibration.json", folder / "calibration.json")
                if (other / "measured.jsonl").is_file():
                    lines = (other / "measured.jsonl").read_text().splitlines()
                    kept = [line for line in lines if not json.loads(line)["key"].startswith("candidate")]
                    (folder / "measured.jsonl").write_text("".join(f"{line}\n" for line in kept))
        started = time.perf_counter()
        make(self.pipe, config, folder, self.measured, self.arguments, {"model": self.args.model})
        return replace(config, plan=str(folder / "plan.json")), time.perf_counter() - started

    def row(self, variant: str, level: str, steps: int, plain: Tensor, others: Tensor) -> dict[str, Any]:
        """Measure one row."""
        config, seconds = self.plan(variant, level, steps)
        plan = config.read()
        diffaccel.accelerate(self.pipe, config)
        try:
            features = self.features(f"{VARIANTS.index(variant)}_{level}", steps, 0)
        finally:
            diffaccel.remove(self.pipe)
        fd, worse = distance_interval(features, others), difference(features, plain, others)
        points = paired_difference(self.scores(features), self.scores(plain)).interval
        return {
            "level": level, "steps": steps, "variant": variant, "weight_average": plan.weight_average,
            "plan_seconds": seconds, "rows": plan.results.get("rows"),
            "fd": ends(fd), "fd_minus_plain": ends(worse), "judge_minus_plain": ends(points),
        }  # fmt: skip

    def table(self, save: Any) -> dict[str, Any]:
        """Measure every row, and tell pairs of rows with intervals."""
        rows: list[dict[str, Any]] = []
        result: dict[str, Any] = {
            "judge": JUDGE, "judge_weights_sha256": self.judge.weights_sha256, "rows": rows, "floors": {}, "pairs": [],
        }  # fmt: skip
        print("| bits | steps | row | mean bits | FD | FD - plain | judge - plain | plan, s |")
        for steps in self.args.steps:
            plain, others = self.features("plain", steps, 0), self.features("plain_others", steps, OTHER_SEEDS)
            floor = distance_interval(plain, others)
            result["floors"][str(steps)] = {"fd": ends(floor), "judge": float(self.scores(plain).mean())}
            print(
                f"| plain | {steps} | other seeds | 16 | {_text(ends(floor))} | | {self.scores(plain).mean():.2f} | |"
            )
            for level in self.args.levels:
                for variant in VARIANTS:
                    row = self.row(variant, level, steps, plain, others)
                    rows.append(row)
                    print(
                        f"| {level} | {steps} | {variant} | {row['weight_average']:.2f} | {_text(row['fd'])} | "
                        f"{_text(row['fd_minus_plain'])} | {_text(row['judge_minus_plain'])} | "
                        f"{row['plan_seconds']:.0f} |", flush=True,
                    )  # fmt: skip
                    save(result)
                for one, two in (("+ both metrics", "+ SQNR"), ("ours", "uniform"), ("ours", "+ both metrics")):
                    told = self._pair(one, two, level, steps, others)
                    result["pairs"].append(told)
                    print(
                        f"{level}, {steps} steps: {one} - {two}: FD {_text(told['fd'])}, judge {_text(told['judge'])}"
                    )
        return result

    def _pair(self, one: str, two: str, level: str, steps: int, others: Tensor) -> dict[str, Any]:
        a, b = (self.features(f"{VARIANTS.index(variant)}_{level}", steps, 0) for variant in (one, two))
        judge = paired_difference(self.scores(a), self.scores(b)).interval
        return {"level": level, "steps": steps, "one": one, "two": two, "fd": ends(difference(a, b, others)),
                "judge": ends(judge)}  # fmt: skip


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True)


def _text(ends: list[float]) -> str:
    return f"{ends[0]:.3g} [{ends[1]:.3g}, {ends[2]:.3g}]"


# -- the first text row -----------------------------------------------------------------------------------------------


def sdxl_unet(small: bool, device: torch.device) -> Any:
    """Return a UNet of SDXL's architecture with random weights; narrower where ``small``."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    widths, depths, text = ((64, 128, 128), (1, 1, 2), 64) if small else ((320, 640, 1280), (1, 2, 10), 2048)
    embedding = 64 * 6 + (32 if small else 1280)
    unet = UNet2DConditionModel(
        sample_size=8 if small else 64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=depths,
        attention_head_dim=tuple(width // 64 for width in widths), cross_attention_dim=text, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=64, projection_class_embeddings_input_dim=embedding,
    )  # fmt: skip
    return unet.to(device).eval().requires_grad_(False)


def _answer_as_to_others(unet: Any, row: Tensor) -> None:
    """Let keys and values of the first row be no larger than those of others, as a trained network's have to be.

    Random weights would turn a row that is 70 times as large into keys that take all attention.
    """
    unit = row / row.norm()
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight -= (1 - OTHER_ROWS / FIRST_ROW) * (module.weight @ unit)[:, None] * unit


@torch.no_grad()
def synthetic_rows(small: bool, device: torch.device) -> dict[str, Any]:
    """Return what static 8-bit activations do to a random SDXL UNet whose first text row is as large as published."""
    unet = sdxl_unet(small, device)
    draw = torch.Generator("cpu").manual_seed(1)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    states = torch.randn(2, 77, width, generator=draw)
    states *= OTHER_ROWS / states.abs().max()
    row = torch.randn(width, generator=draw)
    states[:, 0] = row * FIRST_ROW / row.abs().max()
    _answer_as_to_others(unet, states[0, 0].to(device))
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    extra = {"text_embeds": torch.randn(2, pooled, generator=draw).to(device),
             "time_ids": torch.full((2, 6), 512.0, device=device)}  # fmt: skip
    inputs = (torch.randn(2, 4, side, side, generator=draw).to(device), torch.tensor(999, device=device))
    calls, told = RecordedCalls(), {}
    for name, bos in (("one scale for all tokens", False), ("first row stored", True)):
        config = MixDQ.paper(allocation="uniform", bos="auto" if bos else "off")
        layers = candidates(unet, config)
        recorder = Recorder(layers, "minmax", bos)
        with recorder.watching():
            unet(*inputs, states.to(device), added_cond_kwargs=extra)
        ranges = recorder.result()
        bench = Bench(unet, layers, ranges, config)
        if not calls.calls:
            with calls.recording(unet):
                unet(*inputs, states.to(device), added_cond_kwargs=extra)
        reader = next(n for n, layer in layers.items() if layer.reads_text)
        text = states.to(device)
        exact = layers[reader].module(text)[:, 1:]
        rounded = bench.layer(reader, bench.planned(reader, 8, 8))(text)[:, 1:]
        with bench.with_layers({n: bench.planned(n, 8, 8) for n in layers}, keep=False):
            decibels = calls.noise_ratio(unet)
        told[name] = {"decibels": decibels, "error_of_keys": float((rounded - exact).norm() / exact.norm())}
        print(f"synthetic, W8A8, {name}: SQNR of the UNet {decibels:.1f} dB, error of the keys of other tokens "
              f"{told[name]['error_of_keys']:.4f}", flush=True)  # fmt: skip
    return {"first_row": FIRST_ROW, "others": OTHER_ROWS, "small": small, "synthetic": True, **told}


def rows_table(args: argparse.Namespace) -> dict[str, Any]:
    """Tell the largest value of a model's first text row and of all others, and the synthetic demonstration."""
    quality = Quality(args)
    layers = candidates(
        quality.pipe.transformer if hasattr(quality.pipe, "transformer") else quality.pipe.unet, MixDQ()
    )
    recorder = Recorder(layers)
    with recorder.watching():
        from diffaccel.quant.mixdq.drawings import Drawings

        Drawings(quality.measured[:8], 1, 0, quality.arguments).draw(quality.pipe)
    rows = recorder.result().rows
    if rows is None:
        print(f"{args.model}: no layer reads text by cross-attention, so that there is no first row to store")
    else:
        print(f"{args.model}: largest value of the first text row {rows[0]:.1f}, of all others {rows[1]:.1f}")
    return {"model": args.model, "rows": rows, "sdxl": synthetic_rows(args.small, quality.device)}


def allocation_table(layers: int = 794, repeats: int = 5) -> dict[str, Any]:
    """Time the program on as many layers as SDXL has, and tell how far its plan may be from the best."""
    draw, choices = random.Random(0), []
    for i in range(layers):
        size = draw.choice([320 * 320, 1280 * 1280, 1280 * 10240, 640 * 640 * 9])
        values = sorted(1 - 0.1 * draw.random() ** 4 for _ in range(3))
        choices.append(LayerChoices(f"{i}", {b: float(b * size) for b in (2, 4, 8)},
                                    dict(zip((2, 4, 8), values, strict=True))))  # fmt: skip
    total = sum(choice.cost[2] for choice in choices) / 2
    told = {}
    for average in (3.66, 4.0, 5.02):
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            plan = allocate(choices, average * total)
            times.append(time.perf_counter() - started)
        told[str(average)] = {"seconds": sorted(times)[repeats // 2], "gap": plan.gap}
        seconds = told[str(average)]["seconds"]
        print(f"allocation of {layers} layers at {average} bits: {seconds:.3f} s, gap {plan.gap:.2e}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--model", default="emoji-flux", help="a name of the zoo or a folder")
    add("--prompts", default="emoji-1000", help="that are drawn and judged")
    add("--calibration", default=None, help="file of prompts that plans are made on (default: things the model knows)")
    add("--count", type=int, default=1000, help="prompts of the quality table")
    add("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    add("--steps", nargs="+", type=int, default=[4, 20])
    add("--size", default=None, help="WIDTHxHEIGHT of the pictures")
    add("--batch", type=int, default=100)
    add("--samples", type=int, default=32)
    add("--probes", type=int, default=8)
    add("--ratios", type=int, default=5)
    add("--averages", type=int, default=2)
    add("--small", action="store_true", help="a narrow UNet in the synthetic demonstration, for a CPU")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--kind", default=None, help="name of the machine, for the record's file name")
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = record.Record(kind="bench_mixdq", settings=settings, command=["python", "-m", "scripts.bench_mixdq"])
    report.device = record.describe_device(loading.pick_device(args.device))
    results: dict[str, Any] = {}
    file = args.out / f"bench_mixdq_{Path(args.model).name}_{args.kind or report.device['name'].replace(' ', '_')}.json"

    def save(quality: dict[str, Any] | None = None) -> None:
        if quality is not None:
            results["quality"] = quality
        report.finish(**results).save(file)

    for name in args.tables:
        if name == "quality":
            results[name] = Quality(args).table(save)
        else:
            results[name] = rows_table(args) if name == "rows" else allocation_table()
        save()
    write_json(args.out / "done.json", {"tables": args.tables})


if __name__ == "__main__":
    main()

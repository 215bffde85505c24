"""Train emoji-flux with few bits by QVGen, LSQ+ and the recipe that follows the data, and measure all by the judge.

    python -m scripts.qvgen_emoji --work out/qvgen-emoji --minutes 9 --kind nvidia-h200 --out docs/results

Each call works for at most ``--minutes`` and goes on where the last one stopped, run by run; the last one measures.
Exit status 4 says that work is left. The model draws its own training data, of the first 600 prompts of emoji-1000.
The last 400 are held out, drawn with other seeds, and measured against the full-precision model: likeness picture by
picture, the judge, and the distance of distributions, with intervals, beside its own pictures of other seeds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import diffaccel
import diffaccel.eval
from diffaccel import record
from diffaccel.distill import PipelineTeacher
from diffaccel.eval.sets import prompts
from diffaccel.files import write_json
from diffaccel.quant import QVGen
from diffaccel.quant.qvgen.data import CleanSamples, drawn_samples
from diffaccel.quant.qvgen.train import quantize_aware
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.generate import generate_run
from diffaccel.runs.request import Request
from diffaccel.training.loop import Deadline

MODEL, UNFINISHED = "emoji-flux", 4
METHODS = ("qvgen", "lsq", "dsa")


def run_name(method: str, bits: int, seed: int) -> str:
    return f"{method}-w{bits}a{bits}-{seed}"


def config_of(args: argparse.Namespace, method: str, bits: int) -> QVGen:
    """Return the settings of one run; the recipe that follows the data makes half of the steps."""
    steps = args.steps // 2 if method == "dsa" else args.steps
    rates = {"lr": args.lr, "scale_lr": args.lr, "rank_lr": args.lr, "clip_lr": args.clip_lr}
    return QVGen.preset(
        method, weight_bits=bits, act_bits=bits, steps=steps, batch=args.batch, log_seconds=1.0, **rates
    )


def training_data(args: argparse.Namespace, pipe: Any, arguments: dict[str, Any]) -> CleanSamples:
    """Let the model draw every training prompt with several seeds."""
    texts = [text for text in prompts.read("emoji-1000").texts[: args.train] for _ in range(args.drawings)]
    return drawn_samples(pipe, texts, arguments, args.work / "data", batch=args.draw_batch, seed=10_000, tell=print)


def train_all(args: argparse.Namespace, deadline: Deadline) -> bool:
    """Make the runs that are left, and return whether all are made."""
    device = loading.pick_device(args.device)
    dtype = loading.pick_dtype("auto", device)
    request = Request(model=MODEL, size=(args.size, args.size), prompts=("x",)).with_model_defaults()
    pipe = loading.open_pipeline(request, loading.locate(MODEL)[0], device, dtype)
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(pipe, request)
    samples = training_data(args, pipe, {**arguments, "num_inference_steps": args.sampling})
    model = PipelineTeacher(pipe, samples.prompts, args.batch, arguments)
    for seed in range(args.seeds):
        for bits in args.bits:
            for method in args.methods:
                folder = args.work / run_name(method, bits, seed)
                if (folder / "quantized.json").is_file():
                    continue
                if deadline.left() < 20:
                    return False
                print(f"-- {folder.name}", flush=True)
                done = quantize_aware(
                    model, samples, config_of(args, method, bits), folder, name=MODEL, seconds=deadline.left() - 15,
                    seed=seed, device=device, dtype=dtype, tell=lambda text: print(text, flush=True),
                )  # fmt: skip
                if not done.finished:
                    return False
    return True


def early_norm(folder: Path, steps: int) -> float:
    """Return the mean norm of the gradients in the first fifth of a run."""
    lines = [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]
    norms = [line["norm"] for line in lines if "norm" in line and line["step"] <= max(steps // 5, lines[0]["step"])]
    return sum(norms) / len(norms)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Draw the held-out prompts by every model and compare, with and without guidance to the end."""
    held = tuple(prompts.read("emoji-1000").texts[-args.count :])
    common = {"prompts": held, "size": (args.size, args.size), "batch": args.draw_batch, "steps": args.sampling}
    device = loading.pick_device(args.device)
    dtype = loading.pick_dtype("auto", device)
    plain = replace(Request(model=MODEL, device=args.device, **common), seed=50_000).with_model_defaults()  # type: ignore
    runs, folders = {}, {}
    for name in ["plain", *(run_name(m, b, s) for b in args.bits for m in args.methods for s in range(args.seeds))]:
        folders[name] = args.work / "pictures" / name
        # opened here, so that all are called as the full-precision model is: by its guidance and length of texts
        pipe = None if name == "plain" else diffaccel.load(args.work / name, torch_dtype=dtype).to(device)
        runs[name] = generate_run(plain, folders[name], pipe=pipe, digest=name)
        print(f"drawn: {name}", flush=True)
    comparison = diffaccel.eval.compare(
        folders["plain"], *[folders[name] for name in runs if name != "plain"], report=args.work / "report",
        progress=lambda text: print(text, flush=True),
    )  # fmt: skip
    print(comparison.table())
    norms = {name: early_norm(args.work / name, config_of(args, name.split("-")[0], 4).steps)
             for name in runs if name != "plain"}  # fmt: skip
    return {"table": str(comparison.table()), "early_gradient_norms": norms}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--clip-lr", type=float, default=1e-2)
    parser.add_argument("--train", type=int, default=600, help="training prompts, the first of emoji-1000")
    parser.add_argument("--drawings", type=int, default=4, help="of every training prompt")
    parser.add_argument("--sampling", type=int, default=28, help="steps of drawings")
    parser.add_argument("--draw-batch", type=int, default=100)
    parser.add_argument("--count", type=int, default=400, help="held-out prompts, the last of emoji-1000")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kind", default="cpu", help="name of the machine, for the record's file name")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    deadline = Deadline(60 * args.minutes)
    if not train_all(args, deadline) or deadline.left() < 60 * min(3.0, args.minutes / 4):
        print("work is left: give the same command again")
        return UNFINISHED
    values = measure(args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key not in ("work", "out", "kind")}
        report = record.Record(kind="qvgen_emoji", settings=settings, command=["python", "-m", "scripts.qvgen_emoji"])
        report.device = record.describe_device(torch.device(loading.pick_device(args.device)))
        report.finish(**values).save(args.out / f"qvgen_emoji_{args.kind}.json")
    write_json(args.work / "values.json", values)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

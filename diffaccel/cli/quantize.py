"""``diffaccel quantize``: a model with quantized weights, as a folder that stock ``from_pretrained`` loads."""

from __future__ import annotations

import argparse
import inspect
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel import families, registry, terminal, zoo
from diffaccel.cli import planned, quantize_aware
from diffaccel.cli.sample import methods, split_method_options
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.files import write_json
from diffaccel.runs.call_arguments import call_parameters
from diffaccel.runs.request import DTYPES
from diffaccel.whole_folder import check_free, whole_folder

_EXAMPLES = """examples:
  diffaccel quantize --method w8a8 --out out/emoji-w8a8
  diffaccel quantize ./flux --method w8a8 --w8a8.dtype fp8 --out ./flux-fp8
  diffaccel quantize --method w4a16 --scan "a red apple" --out out/emoji-w4a16   (also: the error of each layer)
  diffaccel quantize ./wan --method qvgen --qvgen.weight-bits 4 --data prompts.txt --out ./wan-w4a4   (trained)
  accelerate launch -m diffaccel quantize ./wan --method qvgen --data clips.safetensors --out ./wan-w4a4
  diffaccel quantize --method mixdq --mixdq.weight-bits 5 --out out/emoji-mixdq    (killed, it goes on when repeated)
  diffaccel sample "a red apple" --model out/emoji-w8a8

In Python, after import diffaccel.quant, from_pretrained loads the folder; diffaccel.load does so as well."""


def make_parser() -> terminal.Parser:
    """Return the parser of the command."""
    parser = terminal.Parser(
        prog="diffaccel quantize", description="Quantize a model's network and save the model.", epilog=_EXAMPLES
    )
    add = parser.add_argument
    add("model", nargs="?", default=zoo.DEFAULT, metavar="MODEL", help=f"as --model of sample (default {zoo.DEFAULT})")
    add(
        "--method",
        default="w8a8",
        metavar="NAME",
        help="w8a8 (default), w4a16, w4a8, mixdq, qvgen; --NAME.FIELD sets an option",
    )
    add("--scan", metavar="PROMPT", help="draw this with the plain network first, and tell the error of each layer")
    add("--prompts", metavar="FILE", help="mixdq: what is drawn to measure on (default: things that the model knows)")
    add("--steps", type=int, metavar="N", help="of drawings: of --scan (default 4), of --data (default the model's)")
    add("--size", metavar="N|WxH", help="mixdq, qvgen: of the model's own drawings (default: its own)")
    add("--guidance", type=float, metavar="G", help="mixdq, qvgen: of these drawings (default: the model's own)")
    add("--negative", metavar="PROMPT", help="mixdq, qvgen: negative prompt of these drawings")
    add("--export", choices=("diffusers", "compressed-tensors"), default="diffusers",
        help="the pipeline for diffusers (default), or its network in the schema of compressed-tensors")  # fmt: skip
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--out", type=terminal.output_path, required=True, metavar="DIR", help="folder of the quantized model")
    add("--overwrite", action="store_true", help="throw away what is in the folder")
    add("--json", action="store_true", help="print one JSON object")
    quantize_aware.add_options(parser)
    return parser


def run(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    words, method_options = split_method_options(argv)
    options = make_parser().parse(words, [f"--{name}.FIELD" for name in registry.names()])
    if options.dtype not in DTYPES:
        raise unknown("dtype", options.dtype, DTYPES)
    if options.steps is not None and options.steps < 1:
        raise DiffAccelError(f"--steps is {options.steps}; it must be 1 or more.")
    if quantize_aware.is_trained(options.method):
        return quantize_aware.run_training(options, quantize_aware.config_of(options, method_options))
    quantize_aware.refuse_options(options)
    (config,) = methods(None, method_options, (options.method,))
    if config.touches != "weights":
        raise DiffAccelError(f"'{config.name}' is no quantizer: it works on the {config.touches}. Use w8a8 or w4a16.")
    if options.steps is not None and options.scan is None:
        own = f" Steps of a plan's drawings are --{config.name}.steps." if hasattr(config, "worker") else ""
        raise DiffAccelError(f"--steps is of the drawing of --scan, which was not asked for. Leave it out.{own}")
    worker = registry.worker(config) if not getattr(config, "plan", "") else None
    if worker is None:
        _refuse_drawings(options, config)
    elif options.export != "diffusers":
        raise DiffAccelError(
            f"--export {options.export} has no form for the mixed precision of '{config.name}'. Leave it out."
        )
    (planned.check_out if worker else check_free)(options.out, options.overwrite)
    _check_kept(options, config)
    from diffaccel.runs.loading import quiet_libraries

    quiet_libraries(True)
    if worker is None:
        _finish(options, config, _open(options))
        return 0
    texts = planned.calibration_prompts(options.model, options.prompts, config.samples)
    pipe, arguments = planned.open_for_plan(options)
    with planned.alone(options.out):
        config, plan = planned.make_plan(worker, options, config, pipe, texts, arguments)
        _finish(options, config, pipe, plan)
        write_json(options.out / planned.FOLDER / planned.SAVED, {"method": config.name})
    return 0


def _refuse_drawings(options: argparse.Namespace, config: Any) -> None:
    """Raise for an option of the model's own drawings beside a method that draws nothing."""
    for name in ("prompts", "size", "guidance", "negative"):
        if getattr(options, name) is not None:
            raise DiffAccelError(
                f"--{name} is of methods that draw with the model, mixdq without a plan and qvgen; '{config.name}' "
                "draws nothing. Leave it out."
            )


def _open(options: argparse.Namespace) -> Any:
    from diffaccel.runs.loading import load, pick_device, pick_dtype

    device = pick_device(options.device)
    pipe = load(options.model, dtype=pick_dtype(options.dtype, device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _finish(options: argparse.Namespace, config: Any, pipe: Any, plan: Any = None) -> None:
    """Scan where it is asked for, quantize, save, and tell what was done."""
    if options.scan is not None and "generator" not in call_parameters(pipe):
        raise DiffAccelError(f"--scan draws from a prompt, which {type(pipe).__name__} does not. Leave it out.")
    scans = _scan(pipe, config, options.scan, options.steps or 4) if options.scan is not None else None
    if plan is None:
        with whole_folder(options.out, options.overwrite) as folder:
            result = quantize(pipe, config, folder, options.export)
    else:  # beside its plan
        result = quantize(pipe, config, options.out, options.export)
    result |= {"out": str(options.out), "model": options.model}
    if scans is not None:
        result["scan"] = {"layers": [vars(layer) for layer in scans.layers], "skip": list(scans.skips())}
    if plan is not None:
        result["plan"] = {"file": config.plan, "weight_average": plan.weight_average, **plan.results}
    if options.json:
        terminal.write_json(result)
        return
    if plan is not None:
        terminal.write(f"{plan}\n")
    if scans is not None:
        terminal.write(f"{scans}\n\nproposed skip: {list(scans.skips()) or 'nothing'}\n")
    for network in result["networks"]:
        terminal.write(
            f"{network['class']}: {network['layers']} layers, {network['bytes_before'] / 2**20:.1f} to "
            f"{network['bytes_after'] / 2**20:.1f} MiB ({network['share']:.3f}) in {result['seconds']:.1f} s"
        )
    terminal.write(f"{options.model} by {config.name}: {options.out}")


def quantize(pipe: Any, config: Any, out: Path, export: str = "diffusers") -> dict[str, Any]:
    """Quantize a pipeline in place, save it to ``out``, and return what was done."""
    from diffaccel.compose import accelerate
    from diffaccel.quant.export import export_compressed_tensors
    from diffaccel.quant.layer import QuantizedLayer

    networks = families.networks(pipe)
    before = [_bytes(network) for network in networks]
    start = time.perf_counter()
    accelerate(pipe, replace(config, originals="drop"))
    seconds = time.perf_counter() - start
    if export == "diffusers":
        pipe.save_pretrained(out)
    else:
        for number, network in enumerate(networks):
            export_compressed_tensors(network, out / f"network_{number}" if len(networks) > 1 else out)
    rows = [
        {
            "class": type(network).__name__,
            "layers": sum(isinstance(module, QuantizedLayer) for module in network.modules()),
            "bytes_before": size,
            "bytes_after": _bytes(network),
            "share": _bytes(network) / size,
        }
        for network, size in zip(networks, before, strict=True)
    ]
    return {"method": config.to_dict(), "networks": rows, "seconds": seconds}


def _scan(pipe: Any, config: Any, prompt: str, steps: int) -> Any:
    import torch

    from diffaccel.quant.scan import scan_errors

    has_latents = (
        getattr(pipe, "vae", None) is not None and "output_type" in inspect.signature(pipe.__call__).parameters
    )
    what = {"output_type": "latent"} if has_latents else {}  # decoding takes time, and asks no quantized network

    def run(pipe: Any) -> None:
        pipe(prompt, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0), **what)

    return scan_errors(pipe, config, run)


def _bytes(network: Any) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _check_kept(options: argparse.Namespace, config: Any) -> None:
    """Raise where the folder that is to be thrown away has what the command reads."""
    if not options.overwrite:
        return
    out = options.out.resolve()
    sources = {"MODEL": options.model, "--prompts": options.prompts, "the plan": getattr(config, "plan", "")}
    for name, source in sources.items():
        path = Path(source).resolve() if source and Path(source).exists() else None
        if path is not None and out in (path, *path.parents):
            raise DiffAccelError(f"--overwrite would throw away {name}, '{source}', which is read. Give another --out.")

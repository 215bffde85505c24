"""A fixed set of calls and the sha256 of what each returns: proof that a change of the code changed no result.

    python -m scripts.fixed_calls --out before.json
    python -m scripts.fixed_calls --against before.json

Tiny random pipelines of every kind that the tests have, stock and under every loop method, and the embedded model by
the command line: on the CPU, one thread a process, in fp32 (a few again in bf16). A refused call is known by its text.
Records of one machine and one set of versions can be compared, no others. Only public names are used, so that modules
may move.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import multiprocessing
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

import diffaccel
from diffaccel import registry
from diffaccel.errors import DiffAccelError

ROOT = Path(__file__).resolve().parents[1]
HELPERS = (ROOT / "tests", ROOT / "tests" / "support")  # where the modules of tiny pipelines may lie
PACKAGES = ("diffaccel", "torch", "diffusers", "transformers", "numpy")
COST = ("nfe", "forwards", "calls", "steps", "decodes", "nfe_by_resolution")
HALF = ("flux", "sd3", "sdxl", "sd", "wan5b", "hunyuan")  # in bf16, too, where state="stock" rounds
CLOSELY = ("flux", "sd", "wan", "chroma")  # whose searches are drawn with all of these options
PATHS = ("rbf", "smc", "svdd", "code")
SEARCHES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"reward": "compress"}) for name in (*PATHS, "bon", "sop")],  # the first of all: for every pipeline
    *[(name, {"max_batch": 1}) for name in (*PATHS, "bon", "sop")],
    *[(name, {"guide": 0.1, "keep": 2}) for name in (*PATHS, "bon", "sop")],
    *[(name, {"path": "vp", "stages": 3}) for name in PATHS],
    *[(name, {"path": "linear", "kernel": "em", "norm": 0.5}) for name in PATHS],
    *[("svdd", {"path": "linear", "scale": s}) for s in ("linear", "sine", "bump", "beta", "flow-grpo", "ancestral")],
    *[("smc", {"potential": potential, "temperature": 0.05}) for potential in ("max", "sum", "last")],
    ("svdd", {"temperature": 0.1}),
    ("rbf", {"rule": "threshold", "threshold": 0.0}),
    ("rbf", {"leftover": "spread", "commit": "first", "against": "last_accepted"}),
    ("rbf", {"path": "vp", "stages": 3, "tail_steps": 0}),
    ("rbf", {"budget": 3}),  # refused
]
COMMANDS = {
    "plain": [],
    "dpmpp2m": ["--sampler", "dpmpp2m"],
    "rbf": ["--sampler", "rbf", "--rbf.budget", "20", "--rbf.reward", "clip"],
}


@dataclass(frozen=True)
class Case:
    """One pipeline and its calls.

    Attributes:
        make: a new pipeline, given whether its calls are guided.
        arguments: of a call, new ones each time, given ``guided``, ``batch`` and, where there is another, ``size``.
        size: another size of its pictures; 0 for none.
        guided: which of the two there are.
        brief: whether one search and no variants are drawn.
    """

    make: Callable[[bool], Any]
    arguments: Callable[..., dict[str, Any]]
    size: int = 0
    guided: tuple[bool, ...] = (True, False)
    brief: bool = False


def all_cases() -> dict[str, Case]:
    """Every tiny pipeline of the tests, by name."""
    sys.path[:0] = [str(folder) for folder in HELPERS if folder.is_dir()]
    modules = ("tiny", "tiny_more", "tiny_others", "tiny_variants", "toy")
    tiny, more, others, variants, toy = (import_module(name) for name in modules)

    def case(make: Callable[..., Any], name: str, arguments: Callable[..., Any], size: int = 0, **options: Any) -> Case:
        return Case(lambda guided: make(name, **options), partial(arguments, name), size)

    found = {name: case(tiny.make, name, tiny.call_kwargs, 48) for name in tiny.FAMILIES}
    found["flux dev"] = case(tiny.make, "flux", tiny.call_kwargs, 48, guidance_embeds=True)
    for name in more.FAMILIES:
        found[name] = case(more.make, name, more.call_kwargs, 48 if name in more.TEXT else 0)
    for name in ("ddpm", "ddim"):
        found[f"{name} unclipped"] = case(more.make, name, more.call_kwargs, clip_sample=False)
        found |= {key: replace(found[key], guided=(False,)) for key in (name, f"{name} unclipped")}
    found["cogvideox dpm"] = case(more.make, "cogvideox", more.call_kwargs, dpm=True)
    for name in others.NAMES:
        found[name] = Case(partial(others.make, name), partial(others.call_kwargs, name), others.SIZES[name][1])
    found["mochi inverted"] = case(others.make, "mochi", others.call_kwargs, inverted=True)
    found["sana variance"] = case(others.make, "sana", others.call_kwargs, out_channels=8)
    for kind in ("img2img", "inpaint", "controlnet"):
        make, arguments = getattr(variants, kind), getattr(variants, f"{kind}_kwargs")
        for name in getattr(variants, kind.upper()):
            found[f"{kind} {name}"] = case(make, name, arguments, 64)
            if kind != "controlnet":
                whole = case(make, name, partial(arguments, strength=1.0))
                found[f"{kind} {name} from noise"] = replace(whole, brief=True)
    for name in variants.IP_ADAPTER:
        found[f"ip-adapter {name}"] = case(variants.with_ip_adapter, name, variants.ip_adapter_kwargs, 64)
    for name in variants.MIXTURES:
        found[name] = case(variants.mixture, name, variants.mixture_kwargs)
    for name, scheduler in schedulers(tiny.TRAINED):
        made = Case(lambda guided, new=scheduler: tiny.make("sd", scheduler=new()), partial(tiny.call_kwargs, "sd"))
        found[f"sd {name}"] = replace(made, guided=(True,), brief=True)
    for name in dict.fromkeys(["plain", *re.findall(r'does == "([^"]+)"', inspect.getsource(toy))]):
        habit = Case(lambda guided: toy.make(), lambda guided, batch, does=name: toy.call_kwargs(does, batch))
        found[f"toy {name}"] = replace(habit, guided=(True,))
    for name in found:
        if name.startswith(("inpaint fill", "FluxControlNet")):  # which take no guidance of two branches
            found[name] = replace(found[name], guided=(True,))
    for name in HALF:
        made = replace(found[name], make=lambda guided, make=found[name].make: make(guided).to(torch.bfloat16))
        found[f"{name} bf16"] = replace(made, brief=True)
    return found


def schedulers(trained: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Schedulers for Stable Diffusion, each with its own levels and with Karras's."""
    for name in sorted(kind.name for kind in diffusers.schedulers.KarrasDiffusionSchedulers):
        kind = getattr(diffusers, name)
        known = inspect.signature(kind.__init__).parameters
        if "beta_schedule" in known and name != "DPMSolverSDEScheduler":  # which needs a package of its own
            yield name, partial(kind, **trained)
            if "use_karras_sigmas" in known:
                yield f"{name} karras", partial(kind, **trained, use_karras_sigmas=True)


def brightness(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that needs no decoder."""
    return latents.flatten(1).mean(1)


vars(brightness).update(input="latents", differentiable=True)


def dim(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A step callback that edits the latents."""
    return {"latents": given["latents"] * 0.9} if index == 1 else {}


def planned(name: str, case: Case, guided: bool) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Label, config's class with its options (None for the stock call) and arguments of every call."""
    loops = {key: kind for key in registry.names() if (kind := registry.config_class(key)).touches == "loop"}
    samplers = {key: partial(kind) for key, kind in loops.items() if not kind.searches}
    least = {key: 80 if key == "sop" else 24 for key in loops if key not in samplers}
    searches = {key: partial(loops[key], reward=brightness, budget=budget) for key, budget in least.items()}
    usual, whole = {"guided": guided, "batch": 2}, guided == case.guided[0] and not case.brief
    few = searches if whole else {"rbf": searches["rbf"]}
    for key, method in {"stock": None, **samplers, **few}.items():
        yield key, method, case.arguments(**usual)
    for key, method in samplers.items() if guided == case.guided[0] else ():
        yield f"{key} in stock state", partial(method, state="stock"), case.arguments(**usual)
    for key, method in {"stock": None, **samplers}.items() if whole else ():
        one = {"generator": torch.Generator().manual_seed(5)}
        yield f"{key}, one generator", method, case.arguments(**usual) | one
        yield f"{key}, one sample", method, case.arguments(guided=guided, batch=1)
        yield f"{key}, callback", method, case.arguments(**usual) | {"callback_on_step_end": dim}
        if case.size:
            yield f"{key}, size {case.size}", method, case.arguments(**usual, size=case.size)
        if method is not None:
            yield f"{key}, one row at a time", partial(method, max_batch=1), case.arguments(**usual)
    for key, options in (SEARCHES if name in CLOSELY else SEARCHES[:1]) if whole else ():
        yield f"{key} {options}", partial(searches[key], **options), case.arguments(**usual)
    yield "stock after all", None, case.arguments(**usual)


def draw_case(name: str, case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every call of one pipeline, by label."""
    for guided in case.guided:
        pipe = case.make(guided)
        known = inspect.signature(type(pipe).__call__).parameters
        for label, method, arguments in planned(name, case, guided):
            if "callback_on_step_end" in known or "callback_on_step_end" not in arguments:
                yield f"{'guided' if guided else 'unguided'}, {label}", drawn(pipe, method, arguments)


def drawn(pipe: Any, method: Callable[[], Any] | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What is known of one call afterwards: its result and cost, or why there is none, and what was warned of."""
    found: dict[str, Any] = {}
    said, logger, handler = [], logging.getLogger("diffaccel"), logging.Handler(logging.WARNING)
    handler.emit = lambda entry: said.append(entry.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    torch.manual_seed(3)  # some pipelines encode their picture with torch's own generator
    try:
        if method is not None:
            diffaccel.accelerate(pipe, method())
        found["result"] = digest(pipe(**arguments))
        found["generator"] = digest([each.get_state() for each in np.atleast_1d(arguments["generator"])])
        if method is not None:
            last = diffaccel.summary(pipe).last_run
            found |= {"cost": {key: last[key] for key in COST}, "report": digest(json.dumps(last["report"]))}
    except DiffAccelError as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    except Exception as error:  # of the pipeline itself, or a defect
        found["failed"] = f"{type(error).__name__}: {error}"
    finally:
        diffaccel.remove(pipe)
        logger.removeHandler(handler)
    return found | ({"said": said} if said else {})


def digest(value: Any) -> str:
    """The sha256 of text, or of arrays with their shapes and dtypes, in whatever an output or a list holds."""
    state = hashlib.sha256()
    if isinstance(value, str):
        state.update(value.encode())
    elif isinstance(value, dict | list | tuple):
        state.update("".join(map(digest, value.values() if isinstance(value, dict) else value)).encode())
    elif value is not None:
        tensor = torch.as_tensor(value).detach().contiguous()
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def draw_command(options: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One run of the embedded model by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "diffaccel", "sample", "a red apple, fluent 3d", "--model", "emoji-flux"]
        command += ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--size", "64", "--steps", "2"]
        command += ["--num", "2", *options, "--out", folder, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            yield "run", {"failed": done.stderr.strip()}
            return
        run, found = json.loads(done.stdout), dict[str, Any]()
        traces = {path: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("search/*/*.json*"))}
        found["pixels"] = [image["pixels_sha256"] for image in run["images"]]
        found["cost"] = {key: run["cost"][key] for key in ("nfe", "forwards", "calls")}
        found["traces"] = {path.relative_to(folder).as_posix(): digest(text) for path, text in traces.items()}
        yield "run", found


@cache
def groups() -> dict[str, Callable[[], Iterator[tuple[str, dict[str, Any]]]]]:
    """What is drawn one after the other in one process, by name."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("diffaccel").propagate = False
    found = {name: partial(draw_case, name, case) for name, case in all_cases().items()}
    return found | {f"emoji-flux {name}": partial(draw_command, options) for name, options in COMMANDS.items()}


def draw_group(name: str) -> dict[str, Any]:
    """The calls of one group, by name."""
    return {f"{name}: {label}": found for label, found in groups()[name]()}


def draw(only: str, processes: int) -> dict[str, Any]:
    """Draw the groups whose names match, and say where."""
    if not Path(diffaccel.__file__).resolve().is_relative_to(ROOT):
        sys.exit(f"{diffaccel.__file__} is not the code of {ROOT}. Run this at the root of the repository.")
    names, calls = [name for name in groups() if re.search(only, name)], dict[str, Any]()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for found in tqdm(pool.imap(draw_group, names), total=len(names), unit="case"):
            calls |= found
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    device = f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread"
    return {"versions": versions, "device": device, "calls": calls}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each call that is not equal."""
    lines = []
    for name, found in before.items():
        if name not in now:
            lines.append(f"missing: {name}")
        for key in sorted({*found, *now.get(name, found)}):
            if found.get(key) != (got := now.get(name, found).get(key)):
                lines.append(f"differs in {key}: {name}: {found.get(key)} -> {got}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--out", type=Path, help="write the record here")
    way.add_argument("--against", type=Path, help="compare with this record")
    parser.add_argument("--only", default="", help="regular expression: names of the cases to draw")
    parser.add_argument("--processes", type=int, default=2, help="that share the cases; results do not depend on it")
    options = parser.parse_args()
    before = json.loads(options.against.read_text(encoding="utf-8")) if options.against else None
    now = draw(options.only, options.processes)
    kinds = {kind: sum(kind in found for found in now["calls"].values()) for kind in ("refused", "failed")}
    print(f"{len(now['calls'])} calls, of which {kinds['refused']} are refused and {kinds['failed']} fail.")
    if before is None:
        options.out.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return 0
    for key in ("versions", "device"):
        if before[key] != now[key]:
            print(f"The record has other {key}: {before[key]}; here {now[key]}.")
    expected = {n: found for n, found in before["calls"].items() if re.search(options.only, n.partition(": ")[0])}
    equal = sum(now["calls"].get(name) == found for name, found in expected.items())
    print(f"{equal} of {len(expected)} calls are equal to the bit; {len(now['calls'].keys() - expected)} are new.")
    for line in differences(expected, now["calls"]):
        print(line)
    return 0 if equal == len(expected) else 1


if __name__ == "__main__":
    sys.exit(main())

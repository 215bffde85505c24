"""Candidates of a comparison, and how each becomes a run: a folder of pictures.

A candidate is a folder of pictures; or a way to draw them: a variant's word, configs of methods, an open pipeline, or a
function of prompts and seeds. Ways are drawn by requests of the same pictures, each into a folder of its own, and go on
where they were stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel import record, registry, zoo
from diffaccel.active import active
from diffaccel.compose import accelerate, remove, set_quality, summary
from diffaccel.config import ORDER
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.metrics.paired import check_images
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.runs.folder import RunFolder
from diffaccel.runs.generate import generate_run
from diffaccel.runs.loading import quiet_libraries
from diffaccel.runs.request import Item, Request
from diffaccel.runs.variant import FILES, PLAIN, Variant, parse

DrawFunction = Callable[[list[str | None], list[int]], Tensor]
_SAMPLED = 1024  # values of each weight that go into a digest


@dataclass(frozen=True)
class Candidate:
    """A way to draw, which becomes a run once it has drawn.

    Attributes:
        name: of its folder, as tables show it.
        draw: draws a request into a folder and returns the run.
        variant: methods and call settings, where the way is nothing else: it can be timed in turns.
    """

    name: str
    draw: Callable[[Request, Path], Run]
    variant: Variant | None = None


def is_pipeline(value: Any) -> bool:
    """Return whether a value is an open pipeline of diffusers."""
    from diffusers import DiffusionPipeline

    return isinstance(value, DiffusionPipeline)


def candidate(value: Any, *, host: Any = None) -> Run | Candidate:
    """Turn a comparison candidate into a run, or into the way to draw one.

    Args:
        value: a :class:`Run` or the path of a folder; a variant or its word, such as ``dpmpp2m:steps=8``; a config or a
            list of configs; an open pipeline; or a function ``(prompts, seeds) -> uint8 (N, 3, H, W)``.
        host: an open pipeline that variants and configs are put on; None opens the request's model.

    Raises:
        DiffAccelError: for anything else, an unknown method or option, and a folder without pictures.
    """
    if isinstance(value, Run):
        return value
    if isinstance(value, Variant):
        return from_variant(value, host)
    if isinstance(value, str | Path):
        return _from_text(value, host)
    if is_pipeline(value):
        variant = Variant(tuple(active_configs(value)), _settings_of_preset(value))
        return Candidate(variant.folder, lambda request, out: _draw(replace(request, **variant.call), out, pipe=value))
    configs = list(value) if isinstance(value, list | tuple) else [value]
    if configs and all(getattr(config, "touches", None) in ORDER for config in configs):
        if config_class := next((config for config in configs if isinstance(config, type)), None):
            raise DiffAccelError(f"Got the class {config_class.__name__}; pass an instance: {config_class.__name__}().")
        return from_variant(Variant(tuple(configs)), host)
    if callable(value):
        name = str(getattr(value, "__name__", type(value).__name__)).strip("<>") or "function"
        return Candidate(name, lambda request, out: draw_function(value, request, out))
    raise DiffAccelError(
        f"A side of a comparison is {type(value).__name__}. Give a run's folder, a variant such as 'plain:steps=8', a "
        "config or a list of configs, an open pipeline, or a function of prompts and seeds."
    )


def _from_text(text: str | Path, host: Any) -> Run | Candidate:
    """Read a text as a variant where it names methods or a variant's file, else as the path of a folder."""
    path, text_is_path = str(text), isinstance(text, Path)
    head = path.partition(":")[0]
    method_names = [PLAIN, *registry.names()]
    if path.endswith(FILES) or (not text_is_path and all(name in method_names for name in head.split("+"))):
        return from_variant(parse(path), host)
    if Path(path).expanduser().is_dir() or text_is_path or "/" in path:
        return open_run(text)
    raise unknown("folder or method", head, method_names)


def from_variant(variant: Variant, host: Any = None) -> Candidate:
    """Return the candidate that a variant draws, on ``host`` or on the request's own model."""

    def draw(request: Request, out: Path) -> Run:
        if host is None:
            return _draw(variant.of(request), out)
        with only_methods(host, variant.methods):
            return _draw(variant.of(request), out, pipe=host)

    return Candidate(variant.folder, draw, variant)


def _draw(request: Request, out: Path, *, pipe: Any = None) -> Run:
    digest = "" if pipe is None else weights_digest(pipe)
    quiet_libraries(request.model in zoo.names())
    generate_run(request, out, pipe=pipe, digest=digest)
    return open_run(out)


# -- open pipelines ---------------------------------------------------------------------------------------------------


def active_configs(pipe: Any) -> list[Any]:
    """Return the configs of the methods that are on a pipeline."""
    configs = []
    for values in summary(pipe).methods:
        options = {key: value for key, value in values.items() if key != "touches"}
        configs.append(registry.config_class(options["name"]).from_dict(options))
    return configs


def _settings_of_preset(pipe: Any) -> dict[str, Any]:
    """Return the call settings of the preset's point that is on a pipeline, such as its steps."""
    return dict((summary(pipe).preset or {}).get("call", {}))


@contextlib.contextmanager
def only_methods(pipe: Any, methods: Sequence[Any]) -> Iterator[None]:
    """Put these methods and no others on ``pipe`` inside the block, and its own methods again after it.

    Raises:
        DiffAccelError: for a pipeline whose own methods changed its network: they are not taken off to be made again.
    """
    own, state = active_configs(pipe), active(pipe)
    if network_method := next((config.name for config in own if config.touches != "loop"), None):
        raise DiffAccelError(
            f"The pipeline has '{network_method}' on its network, and another side is to be drawn without it. Compare "
            "with a pipeline that was loaded again, or name the model: model='...'."
        )
    remove(pipe)
    try:
        if methods:
            accelerate(pipe, *methods)
        yield
    finally:
        remove(pipe)
        if state is not None and state.preset is not None and state.point is not None:
            set_quality(accelerate(pipe, state.preset), state.point.name)
            own = [config for config in own if config not in state.point.methods]
        if own:
            accelerate(pipe, *own)


def weights_digest(pipe: Any) -> str:
    """Return twelve hex digits of an open pipeline's weights: names, shapes and evenly spread values."""
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for name, weight in module.state_dict().items():
            digest.update(f"{part}.{name} {getattr(weight, 'shape', '')} {getattr(weight, 'dtype', '')} ".encode())
            if isinstance(weight, Tensor) and weight.numel():
                flat = weight.detach().flatten()
                values = flat[:: max(1, len(flat) // _SAMPLED)].cpu()
                digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


# -- functions --------------------------------------------------------------------------------------------------------


def draw_function(function: DrawFunction, request: Request, out: Path) -> Run:
    """Draw the pictures that a function makes of a request's prompts (or classes, or None) and seeds.

    It is called with at most ``request.batch`` at a time. What an earlier call finished is used again: give another
    folder when the function changes, since only its name and its code's bytes are compared.

    Raises:
        DiffAccelError: unless it returns uint8 ``(N, 3, H, W)``, one picture a seed.
    """
    code = getattr(getattr(function, "__code__", None), "co_code", b"")
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    settings = {
        "function": name, "code": hashlib.sha256(code).hexdigest()[:12], "prompts": list(request.subjects),
        "num": request.num, "seed": request.seed, "batch": request.batch,
    }  # fmt: skip
    device = {"type": "function", "name": f"wherever {name} runs"}
    run_record = record.Record(kind=record.SAMPLE, settings=settings, device=device)
    folder = RunFolder(out, run_record, request.chunks())
    with folder:
        folder.check()
        finished = folder.finished()
        if len(finished) < len(folder.chunks) or (folder.old() or {}).get("state") != "finished":
            folder.prepare()
            for number, chunk in enumerate(folder.chunks):
                if number not in finished:
                    pictures, seconds = _call_function(function, name, chunk)
                    folder.add(number, pictures, {}, {"seconds": seconds, "peak_memory": None})
            folder.close({})
    return open_run(out)


def _call_function(function: DrawFunction, name: str, chunk: list[Item]) -> tuple[list[Image.Image], float]:
    """Return the pictures that the function draws of a chunk, and the seconds that it took."""
    start = time.perf_counter()
    pixels = function([item.prompt for item in chunk], [item.seed for item in chunk])
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu()  # waits for a GPU
    seconds = time.perf_counter() - start
    if not isinstance(pixels, Tensor):
        raise DiffAccelError(
            f"The function '{name}' returned {type(pixels).__name__}; it must return a uint8 tensor (N, 3, H, W)."
        )
    check_images(pixels, f"pictures of the function '{name}'")
    if len(pixels) != len(chunk):
        raise DiffAccelError(
            f"The function '{name}' returned {len(pixels)} pictures for {len(chunk)} seeds. It must return one a seed."
        )
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in pixels], seconds

"""What may stand on one side of a comparison, and how it becomes a folder of pictures.

A side is a folder of pictures; or a way to draw them: a variant's word, configs of methods, an open pipeline, or a
function of prompts and seeds. Ways are drawn by requests of the same pictures, each into a folder of its own, and go on
where they were stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel import record, registry, zoo
from diffaccel.compose import accelerate, remove, summary
from diffaccel.config import ORDER
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.metrics.paired import check_images
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.runs import generate as sampling
from diffaccel.runs import variant as variants
from diffaccel.runs.folder import RunFolder
from diffaccel.runs.loading import quiet_libraries
from diffaccel.runs.request import Item, Request
from diffaccel.runs.variant import Variant

Function = Callable[[list[str | None], list[int]], Tensor]
_SAMPLED = 1024  # values of each weight that go into a digest


@dataclass(frozen=True)
class Side:
    """A way to draw.

    Attributes:
        name: of its folder, as tables show it.
        draw: from what to draw and a folder to the pictures in it.
        variant: methods and call settings, where the way is nothing else: it can be timed in turns.
    """

    name: str
    draw: Callable[[Request, Path], Run]
    variant: Variant | None = None


def is_pipeline(what: Any) -> bool:
    """Whether it is an open pipeline of diffusers."""
    from diffusers import DiffusionPipeline

    return isinstance(what, DiffusionPipeline)


def side(what: Any, *, host: Any = None) -> Run | Side:
    """The run, or the way to draw one.

    Args:
        what: a :class:`Run` or the path of a folder; a variant or its word, such as ``dpmpp2m:steps=8``; a config or a
            list of configs; an open pipeline; or a function ``(prompts, seeds) -> uint8 (N, 3, H, W)``.
        host: an open pipeline that variants and configs are put on; None opens the request's model.

    Raises:
        DiffAccelError: for anything else, an unknown method or option, and a folder without pictures.
    """
    if isinstance(what, Run):
        return what
    if isinstance(what, Variant):
        return of_variant(what, host)
    if isinstance(what, str | Path):
        return _of_text(what, host)
    if is_pipeline(what):
        methods = tuple(methods_of(what))
        return Side(Variant(methods).folder, lambda request, out: _drawn(request, out, pipe=what))
    configs = list(what) if isinstance(what, list | tuple) else [what]
    if configs and all(getattr(config, "touches", None) in ORDER for config in configs):
        if loose := next((config for config in configs if isinstance(config, type)), None):
            raise DiffAccelError(f"Got the class {loose.__name__}; pass an instance: {loose.__name__}().")
        return of_variant(Variant(tuple(configs)), host)
    if callable(what):
        name = str(getattr(what, "__name__", type(what).__name__)).strip("<>") or "function"
        return Side(name, lambda request, out: draw_function(what, request, out))
    raise DiffAccelError(
        f"A side of a comparison is {type(what).__name__}. Give a run's folder, a variant such as 'plain:steps=8', a "
        "config or a list of configs, an open pipeline, or a function of prompts and seeds."
    )


def _of_text(what: str | Path, host: Any) -> Run | Side:
    text = str(what)
    head = text.partition(":")[0]
    known = [variants.PLAIN, *registry.names()]
    file = text.endswith(variants.FILES)
    if file or (isinstance(what, str) and all(name in known for name in head.split("+"))):
        return of_variant(variants.parse(text), host)
    if Path(text).expanduser().is_dir() or isinstance(what, Path) or "/" in text:
        return open_run(what)
    raise unknown("folder or method", head, known)


def of_variant(variant: Variant, host: Any = None) -> Side:
    """The way to draw of a variant, on ``host`` or on the request's own model."""

    def draw(request: Request, out: Path) -> Run:
        if host is None:
            return _drawn(variant.of(request), out)
        with wearing(host, variant.methods):
            return _drawn(variant.of(request), out, pipe=host)

    return Side(variant.folder, draw, variant)


def _drawn(request: Request, out: Path, *, pipe: Any = None) -> Run:
    digest = "" if pipe is None else weights_digest(pipe)
    quiet_libraries(request.model in zoo.names())
    sampling.generate_run(request, out, pipe=pipe, digest=digest)
    return open_run(out)


def methods_of(pipe: Any) -> list[Any]:
    """The configs of the methods that are on a pipeline."""
    found = []
    for values in summary(pipe).methods:
        options = {key: value for key, value in values.items() if key != "touches"}
        found.append(registry.config_class(options["name"]).from_dict(options))
    return found


@contextlib.contextmanager
def wearing(pipe: Any, methods: Sequence[Any]) -> Iterator[None]:
    """``pipe`` with these methods and no others inside the block, and with its own again after it.

    Raises:
        DiffAccelError: for a pipeline whose own methods changed its network: they are not taken off to be made again.
    """
    before = methods_of(pipe)
    if lasting := next((config.name for config in before if config.touches != "loop"), None):
        raise DiffAccelError(
            f"The pipeline has '{lasting}' on its network, and another side is to be drawn without it. Compare with a "
            "pipeline that was loaded again, or name the model: model='...'."
        )
    remove(pipe)
    try:
        if methods:
            accelerate(pipe, *methods)
        yield
    finally:
        remove(pipe)
        if before:
            accelerate(pipe, *before)


def weights_digest(pipe: Any) -> str:
    """Twelve hex digits that tell an open pipeline's weights from others: names, shapes and evenly spread values."""
    total = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for name, weight in module.state_dict().items():
            total.update(f"{part}.{name} {getattr(weight, 'shape', '')} {getattr(weight, 'dtype', '')} ".encode())
            if isinstance(weight, Tensor) and weight.numel():
                flat = weight.detach().flatten()
                some = flat[:: max(1, len(flat) // _SAMPLED)].cpu()
                total.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def draw_function(function: Function, request: Request, out: Path) -> Run:
    """The pictures that a function makes of a request's prompts (or classes, or None) and seeds.

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
    about = {"type": "function", "name": f"wherever {name} runs"}
    new = record.Record(kind=record.SAMPLE, settings=settings, device=about)
    folder = RunFolder(out, new, request.chunks())
    folder.check()
    done = folder.finished()
    if len(done) < len(folder.chunks) or (folder.old() or {}).get("state") != "finished":
        folder.prepare()
        for number, chunk in enumerate(folder.chunks):
            if number not in done:
                images, seconds = _called(function, name, chunk)
                cost = {"seconds": seconds, "peak_memory": None}
                folder.add(number, images, {}, cost)
        folder.close({})
    return open_run(out)


def _called(function: Function, name: str, chunk: list[Item]) -> tuple[list[Image.Image], float]:
    start = time.perf_counter()
    made = function([item.prompt for item in chunk], [item.seed for item in chunk])
    if isinstance(made, Tensor):
        made = made.detach().cpu()  # waits for a GPU
    seconds = time.perf_counter() - start
    if not isinstance(made, Tensor):
        raise DiffAccelError(
            f"The function '{name}' returned {type(made).__name__}; it must return a uint8 tensor (N, 3, H, W)."
        )
    check_images(made, f"pictures of the function '{name}'")
    if len(made) != len(chunk):
        raise DiffAccelError(
            f"The function '{name}' returned {len(made)} pictures for {len(chunk)} seeds. It must return one a seed."
        )
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in made], seconds

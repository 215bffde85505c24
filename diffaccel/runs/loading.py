"""Load a pipeline from the name of its model: locate its files, choose its device and dtype, accelerate it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import zoo
from diffaccel.compose import accelerate
from diffaccel.errors import DiffAccelError, first_line, unknown
from diffaccel.files import folder_digest
from diffaccel.runs.call_arguments import check_settings, check_subjects, steps_of_student
from diffaccel.runs.request import Request
from diffaccel.runs.whole_weights import find_gap

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"


def find_folder(model: str) -> Path | None:
    """Return the local folder of a model name, or None for ``owner/name`` on the hub.

    Raises:
        DiffAccelError: when it is neither a zoo name nor a folder nor like a hub id, with the nearest zoo name.
    """
    if model in zoo.names():
        return zoo.path(model)
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise unknown("model", model, zoo.names())
    return None


def check_pipeline(model: str, folder: Path) -> None:
    """Raise when a model's folder holds no pipeline."""
    if (folder / INDEX).is_file():
        return
    if model in zoo.names():
        raise DiffAccelError(f"The embedded model '{model}' is no pipeline. Use one that makes images: {zoo.DEFAULT}.")
    raise DiffAccelError(f"'{model}' is a folder without {INDEX}. Give one made by save_pretrained.")


def load(name_or_path: str | Path, **kwargs: Any) -> Any:
    """Load a pipeline from a zoo name, a local folder or a hub id.

    Args:
        name_or_path: as ``diffaccel list`` shows, a folder made by ``save_pretrained``, or ``owner/name`` on the hub.
        kwargs: passed to ``DiffusionPipeline.from_pretrained``.

    Raises:
        DiffAccelError: when there is no such model, with the nearest zoo name; when its files lack weights.
    """
    pipe = _read(name_or_path, **kwargs)
    if gap := find_gap(pipe, kwargs):
        raise DiffAccelError(
            f"The model '{name_or_path}' is incomplete: {gap}. Copy or download it again, or give the component itself."
        )
    return pipe


def _read(name_or_path: str | Path, **kwargs: Any) -> Any:
    """Load a pipeline as :func:`load` does, with whatever weights its files have."""
    from diffusers import DiffusionPipeline

    from diffaccel.quant import hf_quantizer

    hf_quantizer.register()  # for models that were saved quantized
    name = str(name_or_path)
    folder = find_folder(name)
    if folder is not None:
        check_pipeline(name, folder)
        if _class_name(folder) == "NextFramePipeline":
            from diffaccel.models.next_frame.pipeline import NextFramePipeline

            return NextFramePipeline.from_folder(folder, **kwargs)
        _import_own_parts(folder)
        return DiffusionPipeline.from_pretrained(folder, **kwargs)
    try:
        return DiffusionPipeline.from_pretrained(name, **kwargs)
    except OSError as error:
        raise DiffAccelError(
            f"'{name}' is neither in the zoo ({', '.join(zoo.names())}) nor a folder, and the hub gave: {error}"
        ) from error


def _class_name(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name")


def _import_own_parts(folder: Path) -> None:
    """Import the modules of this package that a pipeline names: diffusers takes only what is imported already."""
    for part in json.loads((folder / INDEX).read_text(encoding="utf-8")).values():
        library = part[0] if isinstance(part, list) and part else None
        if isinstance(library, str) and library.startswith("diffaccel."):
            import_module(library)


def locate(model: str) -> tuple[Path, str]:
    """Return the local folder of a model, downloaded if need be, and a digest of its content.

    Raises:
        DiffAccelError: when there is no such model, with the nearest zoo name.
    """
    folder = _local_folder(model)
    if model in zoo.names():
        return folder, folder.name.rpartition("-")[2]
    if Path(model).expanduser().is_dir():
        return folder, folder_digest(folder)
    return folder, folder.name  # a snapshot's folder is named by its commit


def pipeline_class(model: str | Path) -> type[Any] | None:
    """Return the diffusers class that a model's folder names; None where diffusers has no class of that name."""
    import diffusers

    name = diffusers.DiffusionPipeline.load_config(_local_folder(str(model))).get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def student_steps(folder: Path) -> int | None:
    """Return how many steps the distilled student in a folder makes, whatever is asked for; None for another model."""
    part = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("scheduler")
    if not isinstance(part, list) or not str(part[0]).startswith("diffaccel."):
        return None
    kind: Any = getattr(import_module(part[0]), part[1], None)
    if not getattr(kind, "is_of_student", False):
        return None
    return steps_of_student(kind.from_pretrained(folder / "scheduler"))


def _local_folder(model: str) -> Path:
    if (folder := find_folder(model)) is not None:
        check_pipeline(model, folder)
        return folder
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model))
    except Exception as error:
        raise DiffAccelError(
            f"The model '{model}' is neither in the zoo ({', '.join(zoo.names()) or 'none'}) nor a folder, and the hub "
            f"did not give it: {first_line(error)}"
        ) from error


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes the first available of CUDA, MPS and CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:0", "mps")) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:0", "mps"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DiffAccelError(
            f"The device '{name}' is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            ". Use --device cpu, or install a torch that fits the GPU's driver."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DiffAccelError("The device 'mps' is not there. Use --device cpu.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def open_pipeline(request: Request, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Open the request's pipeline on its device, accelerated by the request's methods.

    Raises:
        DiffAccelError: for files that cannot be loaded, and for a pipeline that cannot make what the request asks for.
    """
    pipe = read_whole(request.model, folder, dtype)
    check_settings(pipe, request)
    check_subjects(pipe, request)
    in_place = [method for method in request.methods if method.touches == "graphs"]  # of weights where they are to stay
    movable = [method for method in request.methods if method.touches != "graphs"]  # quantized, it is less to move
    if movable:
        accelerate(pipe, *movable)
    pipe = pipe.to(device)
    return accelerate(pipe, *in_place) if in_place else pipe


def open_plain(request: Request) -> Any:
    """Open a request's pipeline without its methods, on its device."""
    device = pick_device(request.device)
    folder, _ = locate(request.model)
    return open_pipeline(replace(request, methods=()), folder, device, pick_dtype(request.dtype, device))


def read_whole(model: str, folder: Path, dtype: torch.dtype, read: Callable[..., Any] = _read) -> Any:
    """Return the pipeline of a model's folder, with all weights; a damaged cache of the zoo is unpacked again.

    Args:
        read: makes a pipeline of a folder and ``dtype``.

    Raises:
        DiffAccelError: for files that cannot be loaded, and for ones that lack weights.
    """
    try:
        try:
            return _without_gaps(read(folder, dtype=dtype))
        except Exception:
            if model not in zoo.names():
                raise
        return _without_gaps(read(zoo.path(model, verify=True), dtype=dtype))
    except DiffAccelError:
        raise
    except Exception as error:
        advice = "Reinstall diffaccel." if model in zoo.names() else "Copy or download it again."
        raise DiffAccelError(
            f"The model '{model}' cannot be loaded from '{folder}', whose files are damaged, incomplete or of "
            f"another version ({type(error).__name__}: {first_line(error)}). {advice}"
        ) from error


def _without_gaps(pipe: Any) -> Any:
    """Return a pipeline whose networks have all their weights."""
    if gap := find_gap(pipe):
        raise ValueError(gap)
    return pipe


def quiet_libraries(quiet: bool) -> None:
    """Disable the loading bars of diffusers and transformers when ``quiet``, or when stderr is no terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if quiet or not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
